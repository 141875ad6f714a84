import pytest

from flink_llm.local.cluster import last_words

JAVA = """An error occurred while calling o1.execute.
: java.lang.RuntimeException: outer
\tat org.apache.flink.A.b(A.java:1)
Caused by: org.apache.flink.runtime.JobException: Recovery is suppressed
\tat org.apache.flink.A.b(A.java:1)
\t... 3 more
Caused by: {}
\tat org.apache.flink.A.b(A.java:1)
"""
PYTHON = """java.lang.RuntimeException: Error received from SDK harness: Traceback (most recent call last):
  File "x.py", line 1, in call
    raise ValueError("no")
ValueError: no
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (JAVA.format("java.net.ConnectException: refused"), "java.net.ConnectException: refused"),
        (JAVA.format(PYTHON), "ValueError: no"),
        ("one\ntwo\n\tat a.B.c(D.java:1)\n", "two"),
        ("", "no reason given"),
        ("a.B: why\n\tat c.D\n\tSuppressed: e.F: null\n\t\tat g.H\n\tCaused by: i.J: no\n\t\t... 1 more\n", "a.B: why"),
        ("a.B: x\n\tSuppressed: e.F: null\n\t\tat g.H\nCaused by: i.J: why\n\tat k.L\n", "i.J: why"),
        (
            JAVA.format("java.lang.NumberFormatException: no").replace(
                "outer", "Could not parse value 'x' for key 'a.b'."
            ),
            "Could not parse value 'x' for key 'a.b': java.lang.NumberFormatException: no",
        ),
        (
            JAVA.format('SaslException: username="me" password="hush"'),
            'SaslException: username="me" password=********',
        ),
    ],
)
def test_the_innermost_cause_is_what_is_told(text, words):
    assert last_words(text) == words
