//! Series that each worker counts in places of its own, and that are added up when somebody reads them.
//!
//! ```text
//!   worker ── own() ──> counters ─┐
//!   worker ── own() ──> counters ─┼─ collect: added up, labels by labels ─> /metrics
//!   others ── common() ───────────┘
//! ```
//!
//! Two cores that count in one place hand its line of memory back and forth, which takes longer than all else about counting, and
//! the longer the more cores there are.

use std::sync::Arc;

use parking_lot::Mutex;
use prometheus::core::{Collector, Desc};
use prometheus::proto::{self, MetricFamily, MetricType};

/// A series in stripes; a collector of collectors. Cheap to clone.
#[derive(Clone)]
pub struct Striped<C>(Arc<Stripes<C>>);

struct Stripes<C> {
    make: Box<dyn Fn() -> C + Send + Sync>,
    common: C,
    own: Mutex<Vec<C>>,
}

impl<C: Collector + Clone + 'static> Striped<C> {
    /// One stripe for all, and `make` for each further one.
    pub(super) fn new(make: impl Fn() -> C + Send + Sync + 'static) -> Self {
        Self(Arc::new(Stripes { common: make(), own: Mutex::default(), make: Box::new(make) }))
    }

    /// A stripe for one worker, which counts for as long as the process lives: a worker asks once.
    pub fn own(&self) -> C {
        let own = (self.0.make)();
        self.0.own.lock().push(own.clone());
        own
    }

    /// The stripe of all who are no workers.
    pub fn common(&self) -> &C {
        &self.0.common
    }
}

impl<C: Collector> Collector for Striped<C> {
    fn desc(&self) -> Vec<&Desc> {
        self.0.common.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut families = self.0.common.collect();
        for own in self.0.own.lock().iter() {
            for (family, more) in families.iter_mut().zip(own.collect()) {
                add(family, more);
            }
        }
        families
    }
}

/// Adds what another stripe has counted.
fn add(family: &mut MetricFamily, mut more: MetricFamily) {
    let kind = family.get_field_type();
    for metric in more.take_metric() {
        let known = family.mut_metric().iter_mut().find(|known| known.get_label() == metric.get_label());
        match known {
            None => family.mut_metric().push(metric),
            Some(known) => match kind {
                MetricType::COUNTER => {
                    let mut sum = proto::Counter::default();
                    sum.set_value(known.get_counter().get_value() + metric.get_counter().get_value());
                    known.set_counter(sum);
                }
                MetricType::GAUGE => {
                    let mut sum = proto::Gauge::default();
                    sum.set_value(known.get_gauge().get_value() + metric.get_gauge().get_value());
                    known.set_gauge(sum);
                }
                _ => {
                    let sum = histogram(known.get_histogram(), metric.get_histogram());
                    known.set_histogram(sum);
                }
            },
        }
    }
}

/// Both have the same buckets.
fn histogram(one: &proto::Histogram, other: &proto::Histogram) -> proto::Histogram {
    let mut sum = proto::Histogram::default();
    sum.set_sample_count(one.get_sample_count() + other.get_sample_count());
    sum.set_sample_sum(one.get_sample_sum() + other.get_sample_sum());
    let buckets = one.get_bucket().iter().zip(other.get_bucket()).map(|(one, other)| {
        let mut bucket = proto::Bucket::default();
        bucket.set_upper_bound(one.upper_bound());
        bucket.set_cumulative_count(one.cumulative_count() + other.cumulative_count());
        bucket
    });
    sum.set_bucket(buckets.collect());
    sum
}

#[cfg(test)]
mod tests {
    use prometheus::{Encoder, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};

    use super::*;

    #[test]
    fn stripes_are_read_as_one_series() {
        let counters = Striped::new(|| IntCounterVec::new(Opts::new("calls", "c"), &["who"]).unwrap());
        let gauge = Striped::new(|| IntGauge::new("open", "g").unwrap());
        let edges = HistogramOpts::new("seconds", "h").buckets(vec![1.0, 2.0]);
        let times = Striped::new(move || HistogramVec::new(edges.clone(), &["route"]).unwrap());
        let registry = Registry::new();
        let all: [Box<dyn Collector>; 3] =
            [Box::new(counters.clone()), Box::new(gauge.clone()), Box::new(times.clone())];
        all.into_iter().for_each(|one| registry.register(one).unwrap());

        let (first, second) = (counters.own(), counters.own());
        counters.common().with_label_values(&["a"]).inc_by(1);
        first.with_label_values(&["a"]).inc_by(2);
        second.with_label_values(&["a"]).inc_by(4);
        second.with_label_values(&["b"]).inc_by(8);
        // A call may end where it did not begin.
        gauge.own().inc();
        gauge.own().inc();
        gauge.own().dec();
        for (times, seconds) in [(times.own(), 0.5), (times.own(), 1.5), (times.common().clone(), 9.0)] {
            times.with_label_values(&["r"]).observe(seconds);
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&registry.gather(), &mut text).unwrap();
        let lines: Vec<&str> =
            std::str::from_utf8(&text).unwrap().lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            lines,
            [
                r#"calls{who="a"} 7"#,
                r#"calls{who="b"} 8"#,
                "open 1",
                r#"seconds_bucket{route="r",le="1"} 1"#,
                r#"seconds_bucket{route="r",le="2"} 2"#,
                r#"seconds_bucket{route="r",le="+Inf"} 3"#,
                r#"seconds_sum{route="r"} 11"#,
                r#"seconds_count{route="r"} 3"#,
            ]
        );
    }
}
