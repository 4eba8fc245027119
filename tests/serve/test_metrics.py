"""The metrics as Prometheus' own parser reads them."""

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from serve.metrics import Metrics


@dataclass
class Load:
    running: int = 3
    waiting: int = 2
    queued_tokens: int = 900


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Each value by its name and labels, those of time stamps and of this process left out."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "ingress")): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_requests_by_path_and_status():
    metrics = Metrics(["tiny"])
    for path, status in [("/v1/completions", 200), ("/v1/completions", 499), ("unknown", 404), ("unknown", 418)]:
        metrics.started()
        metrics.ended(path, status, 0.03)
    metrics.started()
    found = samples(metrics)
    assert found["headwater_requests_total", "/v1/completions", "200"] == 1
    assert found["headwater_requests_total", "/v1/completions", "499"] == 1
    assert found["headwater_requests_total", "unknown", "404"] == 1
    assert found["headwater_requests_total", "unknown", "4xx"] == 1
    assert found["headwater_requests_in_flight",] == 1
    assert found["headwater_request_seconds_count", "/v1/completions"] == 2
    assert found["headwater_request_seconds_bucket", "0.02", "/v1/completions"] == 0
    assert found["headwater_request_seconds_bucket", "0.05", "/v1/completions"] == 2


def test_tokens_and_their_times_by_model():
    metrics = Metrics(["tiny"])
    metrics.first_token("tiny", 0.15)
    metrics.tokens("tiny", 10, 5, seconds=0.4)
    metrics.tokens("tiny", 1, 1, seconds=0.0)  # of one token there is no time between tokens
    found = samples(metrics)
    assert found["headwater_prompt_tokens_total", "tiny"] == 11
    assert found["headwater_completion_tokens_total", "tiny"] == 6
    assert found["headwater_time_to_first_token_seconds_sum", "tiny"] == 0.15
    assert found["headwater_time_per_output_token_seconds_sum", "tiny"] == 0.1
    assert found["headwater_time_per_output_token_seconds_count", "tiny"] == 1


def test_no_request_can_add_a_label():
    metrics = Metrics(["tiny"])
    for i in range(100):
        metrics.tokens(f"model{i}", 1, 1)
        metrics.first_token(f"model{i}", 0.1)
    assert samples(metrics)["headwater_prompt_tokens_total", "other"] == 100
    assert b"model7" not in metrics.text()


def test_engines_are_asked_when_the_metrics_are_read():
    metrics, load = Metrics(["tiny", "broken"]), Load()
    metrics.watch("tiny", lambda: load)
    metrics.watch("broken", lambda: 1 / 0)
    assert samples(metrics)["headwater_engine_queued_tokens", "tiny"] == 900
    load.running, load.waiting = 0, 7
    found = samples(metrics)
    assert (found["headwater_engine_running", "tiny"], found["headwater_engine_waiting", "tiny"]) == (0, 7)
    assert ("headwater_engine_running", "broken") not in found


def test_two_services_in_a_process_share_nothing():
    one, other = Metrics(["tiny"], ingress="a"), Metrics(["tiny"], ingress="b")
    one.started()
    assert b'headwater_requests_in_flight{ingress="a"} 1.0' in one.text()
    assert b'headwater_requests_in_flight{ingress="b"} 1.0' not in other.text()
