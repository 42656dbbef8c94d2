"""Every metric, declared once. No label carries an object's name."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

CYCLE_SECONDS = Histogram(
    "taskoffer_cycle_duration_seconds",
    "Time of one admission cycle, from snapshot to plan, without the writes.",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
    registry=REGISTRY,
)
DECISIONS = Counter(
    "taskoffer_offers_decided_total",
    "Answers written to offers.",
    ["verdict", "reason", "task_type"],
    registry=REGISTRY,
)
PREEMPTIONS = Counter(
    "taskoffer_jobs_preempted_total",
    "Running jobs that were asked to save and stop for an offer.",
    ["policy"],
    registry=REGISTRY,
)
WRITES = Counter(
    "taskoffer_api_writes_total",
    "Writes to the API server by kind and outcome.",
    ["kind", "outcome"],
    registry=REGISTRY,
)
PENDING = Gauge("taskoffer_offers_pending", "Offers that wait for an answer or for capacity.", registry=REGISTRY)
GPUS = Gauge("taskoffer_gpus", "GPUs of Ready nodes by policy and state.", ["policy", "state"], registry=REGISTRY)
RESYNC_DIFFERENCES = Counter(
    "taskoffer_cache_resync_differences_total",
    "Objects that a LIST corrected in the cache, by kind: what the watch had missed.",
    ["kind"],
    registry=REGISTRY,
)
EVENTS_DROPPED = Counter(
    "taskoffer_events_dropped_total",
    "Events that were not written because too many were waiting.",
    registry=REGISTRY,
)
WATCH_STREAMS = Counter(
    "taskoffer_watch_streams_opened_total",
    "Watch requests that the API server has accepted, by kind. Each lasts for one window.",
    ["kind"],
    registry=REGISTRY,
)
WATCH_GAPS = Counter(
    "taskoffer_watch_gaps_total",
    "Lists that a watch needed because the server no longer had the history that it had missed, by kind.",
    ["kind"],
    registry=REGISTRY,
)
WATCH_HEARD = Gauge(
    "taskoffer_watch_heard_timestamp_seconds",
    "When a watch last said anything, bookmarks included, by kind.",
    ["kind"],
    registry=REGISTRY,
)
WRITE_RETRIES = Counter(
    "taskoffer_api_write_retries_total",
    "Writes that are sent again, or decided again first, by kind and cause.",
    ["kind", "cause"],
    registry=REGISTRY,
)
LEADER = Gauge("taskoffer_leader", "1 while this replica leads.", registry=REGISTRY)
LEASE_TRANSITIONS = Gauge("taskoffer_lease_transitions", "leaseTransitions of the lease.", registry=REGISTRY)
PREDICTION_RATIO = Histogram(
    "taskoffer_prediction_error_ratio",
    "Measured over predicted, once for each job that this replica saw end: above 1 it took more than was told.",
    ["policy", "task_type", "quantity"],
    buckets=(0.25, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4),
    registry=REGISTRY,
)
_KIND = ["policy", "task_type", "family", "size_class", "gpus"]
LEARNED_SUCCESS_RATE = Gauge(
    "taskoffer_learned_success_rate",
    "Success rate that the policy and the outcomes of a kind of task amount to.",
    _KIND,
    registry=REGISTRY,
)
LEARNED_DURATION_FACTOR = Gauge(
    "taskoffer_learned_duration_factor",
    "What predicted times of a kind of task are multiplied with.",
    _KIND,
    registry=REGISTRY,
)
UNREADABLE = Counter(
    "taskoffer_objects_unreadable_total",
    "Stored objects that could not be parsed, by kind.",
    ["kind"],
    registry=REGISTRY,
)
