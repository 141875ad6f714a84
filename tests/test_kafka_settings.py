from pathlib import Path

import certifi
import pytest

from flink_llm.errors import ConfigError
from flink_llm.kafka_settings import (
    KafkaSettings,
    addresses,
    beyond_this_client,
    check_transaction_timeout,
    client_options,
    reason,
)

LOGIN = "org.apache.kafka.common.security.plain.PlainLoginModule required username={0}me{0} password={0}it's{0};"
SASL = {"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN"}


@pytest.mark.parametrize("quote", ['"', "'"])
def test_a_login_is_read_in_either_quotes(quote):
    jaas = LOGIN.format(quote).replace("it's", "it s")
    settings = KafkaSettings(properties={**SASL, "sasl.jaas.config": jaas})
    options = client_options(settings)
    assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("me", "it s")
    assert (options["security_protocol"], options["sasl_mechanism"]) == ("SASL_SSL", "PLAIN")
    assert beyond_this_client(settings) is None


@pytest.mark.parametrize("inline", [True, False])
def test_pem_certificates_are_trusted(inline):
    path = certifi.where()
    store = {"ssl.truststore.certificates": Path(path).read_text()} if inline else {"ssl.truststore.location": path}
    given = {"security.protocol": "SSL", "ssl.truststore.type": "PEM", "ssl.endpoint.identification.algorithm": ""}
    context = client_options(KafkaSettings(properties={**given, **store}))["ssl_context"]
    assert len(context.get_ca_certs()) > 50
    assert context.check_hostname is False


@pytest.mark.parametrize(
    "given", [{"ssl.truststore.location": "/nowhere"}, {"ssl.keystore.key": "no key"}, {"ssl.keystore.location": "/no"}]
)
def test_certificates_that_cannot_be_read_are_one_line(given):
    with pytest.raises(ConfigError, match=r"^kafka.properties.ssl: the certificates cannot be read: "):
        client_options(KafkaSettings(properties={"security.protocol": "SSL", **given}))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"ssl.truststore.location": "a.jks"}, "a truststore of type JKS is read by Java only"),
        (
            {"ssl.keystore.location": "a", "ssl.keystore.type": "PKCS12"},
            "a keystore of type PKCS12 is read by Java only",
        ),
        ({**SASL, "sasl.mechanism": "OAUTHBEARER"}, "sasl.mechanism OAUTHBEARER is spoken by Java only"),
        (SASL, "sasl.jaas.config names no username and password"),
    ],
)
def test_what_only_flinks_client_can_do_refuses_no_job(given, why):
    settings = KafkaSettings(bootstrap_servers="127.0.0.1:1", properties=given)
    assert beyond_this_client(settings) == why
    assert check_transaction_timeout(settings) == f"the broker's transaction.max.timeout.ms could not be read: {why}"


def test_a_password_is_read_as_java_reads_it():
    login = 'org.apache.kafka.common.security.plain.PlainLoginModule required username="bob" password="a\\"b\\\\c";'
    given = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.jaas.config": login}
    assert client_options(KafkaSettings(properties=given))["sasl_plain_password"] == 'a"b\\c'


@pytest.mark.parametrize("servers", ["", "a", "a:", ":1", "a:0", "a:70000", "http://a:1", "a:1,,b:1", "a b:1"])
def test_what_is_no_address_is_refused(servers):
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        addresses(KafkaSettings(bootstrap_servers=servers))


def test_addresses_of_either_family_are_taken():
    assert addresses(KafkaSettings(bootstrap_servers="a-b.example:1, [::1]:9092")) == [
        ("a-b.example", 1),
        ("::1", 9092),
    ]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError(), "KeyError"),
        (OSError("no\nbroker"), "no broker"),
        (
            OSError("failed with 'X(error_code=17, error_message=\"Topic 'a' is no name\", configs=[])'"),
            "Topic 'a' is no name",
        ),
    ],
)
def test_only_the_message_of_an_error_is_shown(error, words):
    assert reason(error) == words
