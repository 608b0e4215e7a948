//! Rate limits: never more than was sold, never less to who waits, and nobody starves.

use std::time::Instant;

use proptest::prelude::*;

use super::super::limits::{Cost, Limits, Throttle};
use super::*;

const SECOND: u128 = 1_000_000_000;
/// Workers of the simulation come at most so late; limits make up for this and more.
const LATE_MS_MAX: u64 = 50;

/// What began: when, counted from the start, and for how much.
struct Begun {
    queue: usize,
    at: Duration,
    cost: Cost,
}

/// Lets queues that are full from the start go through a throttle, as the device does, with a
/// worker that comes late each time.
fn run(limits: Limits, mut queues: Vec<Vec<Cost>>, late: &[u64]) -> Vec<Begun> {
    let start = Instant::now();
    let mut throttle = Throttle::default();
    throttle.set(limits, start);
    let mut begun = Vec::new();
    let mut late = late.iter().cycle().map(|ms| Duration::from_millis(*ms));
    let mut turn = |throttle: &mut Throttle, queue: usize, now: Instant| {
        let waiting: &mut Vec<Cost> = &mut queues[queue];
        while let Some(cost) = waiting.first().copied() {
            if !throttle.pay(queue, cost, now) {
                return;
            }
            waiting.remove(0);
            begun.push(Begun { queue, at: now - start, cost });
        }
        throttle.leave(queue, now);
    };
    for queue in 0..3 {
        turn(&mut throttle, queue, start);
    }
    let mut now = start;
    for _ in 0..10_000 {
        let Some(until) = throttle.deadline() else { break };
        now = until.max(now) + late.next().unwrap();
        let queue = throttle.due(now).expect("somebody waits, and it is time");
        turn(&mut throttle, queue, now);
    }
    assert!(throttle.deadline().is_none(), "somebody waits for ever");
    assert!(queues.iter().all(Vec::is_empty));
    begun
}

fn requests(bytes: &[u64]) -> Vec<Cost> {
    bytes.iter().map(|bytes| Cost { requests: 1, bytes: *bytes }).collect()
}

/// When a request may begin at the earliest, if `before` was taken from a full bucket.
fn earliest_ns(before: u64, cost: u64, rate: u64, burst: u64) -> u128 {
    let needed = (before + cost.min(burst)).saturating_sub(burst);
    (u128::from(needed) * SECOND).div_ceil(u128::from(rate))
}

fn queues() -> impl Strategy<Value = Vec<Vec<Cost>>> {
    let queue = prop::collection::vec(1u64..200_000, 0..40).prop_map(|bytes| requests(&bytes));
    prop::collection::vec(queue, 3)
}

fn late() -> impl Strategy<Value = Vec<u64>> {
    prop::collection::vec(0..LATE_MS_MAX, 1..10)
}

proptest! {
    /// Whatever is asked for and however late the worker comes: both limits hold at each moment.
    #[test]
    fn never_more_than_was_sold(
        queues in queues(),
        late in late(),
        iops in 1u64..3000,
        iops_burst in 1u64..50,
        bytes_per_second in 10_000u64..50_000_000,
        bytes_burst in 1u64..500_000,
    ) {
        let limits = Limits { iops, iops_burst, bytes_per_second, bytes_burst };
        let (mut requests, mut bytes) = (0, 0);
        for Begun { at, cost, .. } in run(limits, queues, &late) {
            let earliest = earliest_ns(requests, cost.requests, iops, iops_burst)
                .max(earliest_ns(bytes, cost.bytes, bytes_per_second, bytes_burst));
            prop_assert!(at.as_nanos() >= earliest, "at {at:?}, not before {earliest} ns");
            requests += cost.requests;
            bytes += cost.bytes;
        }
    }

    /// Who waits gets all of the budget: each request begins when it may, or as late as the
    /// worker comes, and the lateness of many does not add up.
    #[test]
    fn never_less_to_who_waits(
        queues in queues(),
        late in late(),
        rate in 10_000u64..50_000_000,
        burst in 1u64..500_000,
        by_bytes in any::<bool>(),
    ) {
        let limits = if by_bytes {
            Limits { bytes_per_second: rate, bytes_burst: burst, ..Limits::default() }
        } else {
            Limits { iops: rate / 1000, iops_burst: 1, ..Limits::default() }
        };
        let mut before = 0;
        // Each queue whose turn it is may come late by itself.
        let late_ns = u128::from(3 * LATE_MS_MAX) * SECOND / 1000;
        for Begun { at, cost, .. } in run(limits, queues, &late) {
            let earliest = if by_bytes {
                earliest_ns(before, cost.bytes, rate, burst)
            } else {
                earliest_ns(before, 1, rate / 1000, 1)
            };
            prop_assert!(at.as_nanos() <= earliest + late_ns, "{at:?}, might at {earliest} ns");
            before += if by_bytes { cost.bytes } else { 1 };
        }
    }
}

/// A queue of large requests has its turn among queues of small ones.
#[test]
fn large_requests_are_not_overtaken_for_ever() {
    let limits = Limits { bytes_per_second: 1 << 20, bytes_burst: 1 << 20, ..Limits::default() };
    let queues = vec![requests(&[4096; 400]), requests(&[1 << 20; 3]), requests(&[4096; 400])];
    let begun = run(limits, queues, &[0]);
    let last_large = begun.iter().rposition(|begun| begun.queue == 1).unwrap();
    let small_before = begun[..last_large].iter().filter(|begun| begun.queue == 0).count();
    assert!(small_before < 400, "all of queue 0 went before the large ones");
    // And the small ones do not wait for all of the large ones.
    let first_small = begun.iter().position(|begun| begun.queue == 2).unwrap();
    assert!(first_small < last_large);
}

/// An hour of rest saves up one burst.
#[test]
fn a_rest_saves_up_one_burst() {
    let start = Instant::now();
    let mut throttle = Throttle::default();
    throttle.set(Limits { iops: 100, iops_burst: 7, ..Limits::default() }, start);
    for hours in 1..4 {
        let now = start + Duration::from_secs(hours * 3600);
        let cost = Cost { requests: 1, bytes: 512 };
        let begun = (0..20).filter(|_| throttle.pay(0, cost, now)).count();
        assert_eq!(begun, 7);
        assert_eq!(throttle.deadline(), Some(now + Duration::from_millis(10)));
        // The guest thinks better of it.
        throttle.leave(0, now);
        assert_eq!(throttle.deadline(), None);
    }
    // Nor does changing the limits there and back.
    let now = start + Duration::from_secs(4 * 3600);
    let cost = Cost { requests: 1, bytes: 0 };
    assert_eq!((0..20).filter(|_| throttle.pay(0, cost, now)).count(), 7);
    throttle.set(Limits { iops: 100, iops_burst: 7, ..Limits::default() }, now);
    assert!(!throttle.pay(0, cost, now));
}

/// The largest numbers are no reason to panic.
#[test]
fn extremes_are_numbers_like_others() {
    let start = Instant::now();
    let most = u64::MAX;
    for (rate, burst) in [(1, most), (most, 1), (most, most), (1, 1)] {
        let mut throttle = Throttle::default();
        let limits =
            Limits { iops: rate, iops_burst: burst, bytes_per_second: rate, bytes_burst: burst };
        throttle.set(limits, start);
        for seconds in [0, 1, 1 << 30] {
            let now = start + Duration::from_secs(seconds);
            for _ in 0..3 {
                throttle.pay(0, Cost { requests: most, bytes: most }, now);
            }
        }
    }
}

fn limit(bench: &Bench, limits: Limits) {
    bench.driver.device.with(|blk: &mut Blk, _| blk.set_limits(limits, Instant::now())).unwrap();
}

fn read(sector: u64) -> Ask<'static> {
    Ask { kind: IN, sector, room: 512, ..Ask::default() }
}

const ONE_EACH_HOUR: Limits =
    Limits { iops: 0, iops_burst: 0, bytes_per_second: 1, bytes_burst: 3600 };

/// What has no budget stays in its queue, in order; a change of the limits reaches it at once.
#[test]
fn what_waits_is_not_under_way() {
    let (mut bench, gate) = gated();
    limit(&bench, ONE_EACH_HOUR);
    // Eight sectors are more than the burst: the first goes into debt.
    bench.put(0, 0, Ask { room: 4096, ..read(0) });
    for slot in 1..4 {
        bench.put(0, slot, read(slot.into()));
    }
    bench.driver.kick(0);
    wait_until("the first is under way", || gate.submitted() == 1);
    gate.release_all();
    assert_eq!(bench.driver.wait_used(0), (0, 4097));
    // Neither a pause nor more kicks change that.
    bench.driver.device.pause_within(Duration::ZERO).unwrap();
    bench.driver.device.resume();
    bench.driver.kick(0);
    // A flush of another queue is not held up; when it is done, the worker has looked at both.
    bench.put(1, 8, Ask { kind: FLUSH_KIND, ..Ask::default() });
    bench.driver.kick(1);
    wait_until("the flush is under way", || gate.submitted() == 1);
    assert!(gate.is(0, |work| matches!(work, Work::Flush)));
    gate.release_all();
    assert_eq!(bench.driver.wait_used(1), (32, 1));
    assert_eq!((gate.held(), bench.driver.used(0)), (0, None));

    limit(&bench, Limits::default());
    wait_until("the others are under way", || gate.submitted() == 3);
    assert!(gate.is(0, |work| matches!(work, Work::Read { offset: 512, .. })));
    assert!(gate.is(1, |work| matches!(work, Work::Read { offset: 1024, .. })));
    assert!(gate.is(2, |work| matches!(work, Work::Read { offset: 1536, .. })));
    gate.release_all();
    for slot in 1..4 {
        assert_eq!(bench.driver.wait_used(0), (slot * 4, 513));
    }
}

/// A flush stays behind the writes of its queue.
#[test]
fn order_within_a_queue_is_kept() {
    let (mut bench, gate) = gated();
    limit(&bench, ONE_EACH_HOUR);
    bench.put(0, 0, Ask { room: 4096, ..read(0) });
    bench.put(0, 1, Ask { kind: OUT, output: &[7; 512], ..Ask::default() });
    bench.put(0, 2, Ask { kind: FLUSH_KIND, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("the first is under way", || gate.submitted() == 1);
    gate.release_all();
    bench.driver.wait_used(0);
    bench.driver.device.pause_within(Duration::ZERO).unwrap();
    assert_eq!(gate.held(), 0);
    bench.driver.device.resume();
    limit(&bench, Limits::default());
    wait_until("both are under way", || gate.submitted() == 2);
    assert!(gate.is(0, |work| matches!(work, Work::Write { .. })));
    assert!(gate.is(1, |work| matches!(work, Work::Flush)));
    gate.release_all();
}

/// A guest that waits may reset its disk, and begins anew.
#[test]
fn a_reset_forgets_who_waits() {
    let (mut bench, gate) = gated();
    limit(&bench, ONE_EACH_HOUR);
    bench.put(0, 0, Ask { room: 4096, ..read(0) });
    bench.put(0, 1, read(1));
    bench.driver.kick(0);
    wait_until("the first is under way", || gate.submitted() == 1);
    gate.release_all();
    bench.driver.wait_used(0);
    assert_eq!(bench.driver.start(ALL), 15);
    limit(&bench, Limits::default());
    bench.put(1, 0, read(5));
    bench.driver.kick(1);
    wait_until("the new one is under way", || gate.submitted() == 1);
    assert!(gate.is(0, |work| matches!(work, Work::Read { offset: 2560, .. })));
    gate.release_all();
    assert_eq!((bench.driver.wait_used(1), bench.driver.used(0)), ((0, 513), None));
}

/// On the clock: a thousand a second are not more, and go on by themselves; on both queues.
#[test]
fn a_thousand_a_second_are_a_thousand_a_second() {
    for which in backends() {
        let mut bench = Bench::new(which);
        limit(&bench, Limits { iops: 1000, iops_burst: 1, ..Limits::default() });
        for queue in 0..2 {
            bench.put(queue, queue as u16, read(3));
            for _ in 1..100 {
                bench.driver.offer(queue, queue as u16 * 4);
            }
        }
        let began = Instant::now();
        bench.driver.kick(0);
        bench.driver.kick(1);
        for _ in 0..100 {
            bench.driver.wait_used(0);
            bench.driver.wait_used(1);
        }
        let took = began.elapsed();
        // The bucket was full before the clock was read, and then its level was one.
        assert!(took >= Duration::from_millis(199), "{which:?}: {took:?}");
        println!("{which:?}: 200 requests at 1000 a second took {took:?}");
    }
}
