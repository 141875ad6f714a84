-- Support tickets of one topic, read by models, into another. docs/sql.md says how to run it.

SET 'pipeline.name' = 'enrich';
SET 'pipeline.global-job-parameters' = 'flink-llm.config:/etc/flink-llm/job.yaml';
SET 'execution.checkpointing.interval' = '1 s';
-- What is answered leaves with its whole bundle, and a batch of rows is asked at once: by default 1 s and 1000 rows.
SET 'python.fn-execution.bundle.time' = '50';
SET 'python.fn-execution.bundle.size' = '256';
SET 'python.fn-execution.arrow.batch.size' = '256';

CREATE TEMPORARY SYSTEM FUNCTION llm_classify AS 'flink_llm.udfs.sql.llm_classify' LANGUAGE PYTHON;
CREATE TEMPORARY SYSTEM FUNCTION llm_generate_row AS 'flink_llm.udfs.sql.llm_generate_row' LANGUAGE PYTHON;

CREATE TEMPORARY TABLE tickets (
  ticket_id STRING,
  `text` STRING,
  sent TIMESTAMP_LTZ(3) METADATA FROM 'timestamp' VIRTUAL
) WITH (
  'connector' = 'kafka',
  'topic' = 'tickets',
  'properties.bootstrap.servers' = 'localhost:9092',
  'properties.group.id' = 'enrich',
  'properties.auto.offset.reset' = 'earliest',
  'scan.startup.mode' = 'group-offsets',
  'format' = 'json',
  'json.ignore-parse-errors' = 'true'  -- a broken record is skipped; apply() would report it
);

CREATE TEMPORARY TABLE answers (
  ticket_id STRING,
  mood STRING,
  reply STRING,
  error_code STRING,
  error_message STRING,
  model_hash STRING,
  sent TIMESTAMP_LTZ(3) METADATA FROM 'timestamp'
) WITH (
  'connector' = 'kafka',
  'topic' = 'tickets.answers',
  'properties.bootstrap.servers' = 'localhost:9092',
  'key.format' = 'raw',
  'key.fields' = 'ticket_id',
  'value.format' = 'json',
  'sink.delivery-guarantee' = 'exactly-once',
  'sink.transactional-id-prefix' = 'enrich-answers',
  'sink.transaction-naming-strategy' = 'pooling',
  'properties.transaction.timeout.ms' = '600000'
);

INSERT INTO answers
SELECT ticket_id, mood, r.`value`, r.error_code, r.error_message, r.model_hash, sent
FROM (
  SELECT
    ticket_id, sent,
    llm_classify('moods', `text`) AS mood,
    llm_generate_row('support', CONCAT('Answer in one sentence: ', `text`), '{"max_tokens": 60, "deadline": 20}') AS r
  FROM tickets
  WHERE ticket_id IS NOT NULL
);
