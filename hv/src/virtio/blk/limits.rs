//! Rate limits of a disk: requests and bytes a second, each with a burst. Pure: time is an
//! argument, and whoever is refused is told the moment when he may begin.
//!
//! What waits stays in its queue, so that a request without budget is not under way: pausing does
//! not wait for it, and it travels in the guest's memory. Queues that wait stand in line: only the
//! first may begin something, and goes to the end of the line when it has and waits again. So no
//! queue starves, and a large request is not overtaken for ever by small ones.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::requests::Request;

/// How much of the time for which a worker came late to a waiting request is made up for.
const LATE_MAX: Duration = Duration::from_millis(100);
/// What a bucket holds without a burst of its own: this part of a second's budget.
const BURST_SECONDS_DIVISOR: u64 = 10;
const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// Limits of one disk; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Requests a second.
    pub iops: u64,
    /// Requests that may begin at once after a rest; 0 is a tenth of a second's.
    pub iops_burst: u64,
    /// Bytes a second.
    pub bytes_per_second: u64,
    /// Bytes that may begin at once after a rest; 0 is a tenth of a second's.
    pub bytes_burst: u64,
}

impl Limits {
    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// What a request takes from the budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Cost {
    pub(super) requests: u64,
    pub(super) bytes: u64,
}

impl Cost {
    /// A flush costs nothing: it makes durable what was paid for already. To discard moves no
    /// bytes, but each range is work of its own.
    pub(super) fn of(request: &Request) -> Self {
        match request {
            Request::Read { data, .. } | Request::Write { data, .. } => {
                let bytes = data.iter().map(|segment| u64::from(segment.len)).sum();
                Self { requests: 1, bytes }
            }
            Request::Discard(spans) => Self { requests: spans.len() as u64, bytes: 0 },
            Request::WriteZeroes(spans) => {
                let bytes = spans.iter().map(|span| span.bytes).sum();
                Self { requests: spans.len() as u64, bytes }
            }
            Request::Flush | Request::Id(_) => Self::default(),
        }
    }
}

/// A token bucket. Its level is counted in tokens × nanoseconds, so that nothing is rounded away.
#[derive(Debug, Clone)]
struct Bucket {
    rate: u64,
    burst: u64,
    level: i128,
    at: Instant,
}

impl Bucket {
    fn full(rate: u64, burst: u64, now: Instant) -> Self {
        let burst = if burst == 0 { (rate / BURST_SECONDS_DIVISOR).max(1) } else { burst };
        let mut bucket = Self { rate, burst, level: 0, at: now };
        bucket.level = bucket.level_max();
        bucket
    }

    fn level_max(&self) -> i128 {
        i128::from(self.burst) * i128::from(NANOS_PER_SECOND)
    }

    /// Fills up to this time; an earlier one than before changes nothing.
    fn fill(&mut self, to: Instant) {
        let passed_ns = to.saturating_duration_since(self.at).as_nanos();
        let gained = passed_ns.saturating_mul(u128::from(self.rate));
        let gained = i128::try_from(gained).unwrap_or(i128::MAX);
        self.level = self.level.saturating_add(gained).min(self.level_max());
        self.at = self.at.max(to);
    }

    /// When so much may be taken. Who asks for more than the bucket holds waits until it is full,
    /// and leaves a debt.
    fn ready(&self, cost: u64) -> Instant {
        let needed = i128::from(cost.min(self.burst)) * i128::from(NANOS_PER_SECOND) - self.level;
        let Ok(missing @ 1..) = u128::try_from(needed) else { return self.at };
        let wait_ns = missing.div_ceil(u128::from(self.rate));
        self.at + Duration::from_nanos(u64::try_from(wait_ns).unwrap_or(u64::MAX))
    }

    fn take(&mut self, cost: u64) {
        let tokens = i128::from(cost) * i128::from(NANOS_PER_SECOND);
        self.level = self.level.saturating_sub(tokens);
    }
}

/// The budget of a disk.
#[derive(Debug, Clone, Default)]
struct Budget {
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
    /// Somebody waits. Then a request counts as begun when it could have, not when somebody came
    /// to look: a thread that wakes up late, by however little, loses no budget.
    behind: bool,
}

impl Budget {
    fn set(&mut self, limits: Limits, now: Instant) {
        let change = |bucket: &mut Option<Bucket>, rate, burst| {
            if rate == 0 {
                *bucket = None;
                return;
            }
            let mut new = Bucket::full(rate, burst, now);
            if let Some(old) = bucket {
                // What was used up stays so, or changing limits would be a way around them.
                old.fill(now);
                new.level = new.level.min(old.level);
            }
            *bucket = Some(new);
        };
        change(&mut self.requests, limits.iops, limits.iops_burst);
        change(&mut self.bytes, limits.bytes_per_second, limits.bytes_burst);
    }

    /// The buckets from which so much is taken. What costs nothing is not held up by a debt.
    fn limited(&mut self, cost: Cost) -> impl Iterator<Item = (&mut Bucket, u64)> {
        let all = [(&mut self.requests, cost.requests), (&mut self.bytes, cost.bytes)];
        let taken = all.into_iter().filter(|(_, cost)| *cost > 0);
        taken.filter_map(|(bucket, cost)| Some((bucket.as_mut()?, cost)))
    }

    /// Takes this, or says when it can be taken.
    fn take(&mut self, cost: Cost, now: Instant) -> Result<(), Instant> {
        let seen = if self.behind { now.checked_sub(LATE_MAX).unwrap_or(now) } else { now };
        let mut begin = None;
        for (bucket, cost) in self.limited(cost) {
            bucket.fill(seen);
            begin = begin.max(Some(bucket.ready(cost)));
        }
        let Some(begin) = begin else { return Ok(()) };
        if begin > now {
            self.behind = true;
            return Err(begin);
        }
        for (bucket, cost) in self.limited(cost) {
            bucket.fill(begin);
            bucket.take(cost);
        }
        Ok(())
    }
}

/// The limits of a device, and who waits for them.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    budget: Budget,
    /// Queues that wait; the first is next.
    line: VecDeque<usize>,
    /// The first has begun something since it is the first.
    served: bool,
    /// When the first is to be looked at. There whenever somebody waits.
    until: Option<Instant>,
}

impl Throttle {
    pub(super) fn set(&mut self, limits: Limits, now: Instant) {
        self.budget.set(limits, now);
        self.look_again(now);
    }

    /// Whether the next request of this queue may begin; then it is paid for. If not, the queue
    /// stands in line. What costs nothing waits only behind others of its own queue.
    pub(super) fn pay(&mut self, queue: usize, cost: Cost, now: Instant) -> bool {
        if cost == Cost::default() {
            return true;
        }
        if self.line.front().is_some_and(|first| *first != queue) {
            if !self.line.contains(&queue) {
                self.line.push_back(queue);
            }
            return false;
        }
        let Err(until) = self.budget.take(cost, now) else {
            self.served = true;
            return true;
        };
        if self.line.is_empty() {
            self.line.push_back(queue);
        }
        if std::mem::take(&mut self.served) && self.line.len() > 1 {
            self.line.rotate_left(1);
            self.until = Some(now);
        } else {
            self.until = Some(until);
        }
        false
    }

    /// This queue waits for no budget.
    pub(super) fn leave(&mut self, queue: usize, now: Instant) {
        let first = self.line.front() == Some(&queue);
        self.line.retain(|waiting| *waiting != queue);
        if first {
            self.served = false;
            self.look_again(now);
        }
    }

    /// The first queue in line is to be looked at soon, if there is one.
    pub(super) fn look_again(&mut self, now: Instant) {
        self.until = self.line.front().map(|_| now);
        self.budget.behind = self.until.is_some();
    }

    /// Nobody waits any more.
    pub(super) fn forget_waiting(&mut self) {
        (self.line, self.served, self.until) = (VecDeque::new(), false, None);
        self.budget.behind = false;
    }

    /// The queue that is to be looked at now.
    pub(super) fn due(&self, now: Instant) -> Option<usize> {
        self.line.front().copied().filter(|_| self.until.is_some_and(|until| until <= now))
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.until
    }
}
