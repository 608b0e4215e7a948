//! When to stop copying: pure.
//!
//! The copy ends when what is left fits the pause at the measured rate *and* another pass would
//! not make it much smaller; a pass costs little then, and the pause is what a customer notices.
//! When a limit on passes, bytes or time is reached before that, a guest whose rest fits a few
//! times the target still moves: an operator who empties a node is served better by a pause that
//! is somewhat longer than by none. With more left than that the migration fails, and the guest
//! goes on where it is: a long pause is not a way out.
//!
//! Disks come first, as they take longest, pass by pass until the rest is little or does not
//! shrink. Then memory; what is written to disks meanwhile goes along in the same passes, and
//! counts like memory: one sum is what has to fit the pause, and the limits.

use std::time::Duration;

/// A domain's downtime target when none is given.
const DOWNTIME_DEFAULT: Duration = Duration::from_millis(100);
const DOWNTIME_MAX: Duration = Duration::from_secs(10);
const ROUNDS_DEFAULT: u32 = 30;
const ROUNDS_MAX: u32 = 1000;
/// Bytes sent, in multiples of the domain's memory and disks.
const BYTES_DEFAULT_FACTOR: u64 = 8;
/// Besides the time for disks.
const TOTAL_TIME_DEFAULT: Duration = Duration::from_secs(600);
/// Disks get so much more time by default, as if each byte of them went at this rate (or at the
/// bandwidth that is allowed, if that is less).
const DISK_RATE_MIN: u64 = 10 << 20;
/// Most passes over disks alone, and most of all passes, as a part of `rounds_max`.
const DISK_ROUNDS_MAX: u32 = 8;
const DISK_ROUNDS_PART: u32 = 2;
/// What goes over in this time is not worth a pass over disks alone.
const DISK_REST: Duration = Duration::from_secs(1);
const TOTAL_TIME_MAX: Duration = Duration::from_secs(24 * 3600);
/// Of the pause, what is not memory: stopping, device state, hand-over. At most half of the
/// target is set aside for it.
const STATE_TIME: Duration = Duration::from_millis(20);
/// At a limit, the longest pause that is still taken, in multiples of the downtime target.
const PAUSE_AT_LIMIT_FACTOR: u32 = 4;
/// Less than this is sent in no time: no pass is spent on it.
const SMALL_BYTES: u64 = 256 << 10;
/// A round below this says nothing about the link's rate.
const RATE_SAMPLE_BYTES: u64 = 256 << 10;

/// Bounds of one migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest pause aimed at.
    pub downtime: Duration,
    /// Most passes over disks and memory, the last included.
    pub rounds_max: u32,
    /// Most bytes of memory and disks sent.
    pub bytes_max: u64,
    /// Longest time from the start to the pause.
    pub total_time: Duration,
    /// Most bytes a second; 0 is unlimited.
    pub bandwidth_max: u64,
}

impl Limits {
    /// The limits that were asked for; what is zero or absent gets its default.
    ///
    /// # Errors
    /// When one is out of its range: the text names the field, the value and the range.
    pub fn from_request(
        request: Option<&drover_proto::v1::MigrationLimits>,
        memory_bytes: u64,
        disk_bytes: u64,
    ) -> Result<Self, String> {
        let request = request.cloned().unwrap_or_default();
        let duration = |field: &str,
                        value: Option<prost_types::Duration>,
                        default,
                        max: Duration| {
            let Some(value) = value else { return Ok(default) };
            let asked = Duration::try_from(value).map_err(|_| {
                format!("limits.{field}: {value:?}; accepted: a positive duration up to {max:?}")
            })?;
            match asked {
                Duration::ZERO => Ok(default),
                _ if asked > max => {
                    Err(format!("limits.{field}: {asked:?}; accepted: at most {max:?}"))
                }
                _ => Ok(asked),
            }
        };
        let rounds_max = match request.rounds_max {
            0 => ROUNDS_DEFAULT,
            1..=ROUNDS_MAX => request.rounds_max,
            other => {
                return Err(format!("limits.rounds_max: {other}; accepted: 1 to {ROUNDS_MAX}"));
            }
        };
        let bytes_max = match request.bytes_max {
            0 => memory_bytes.saturating_add(disk_bytes).saturating_mul(BYTES_DEFAULT_FACTOR),
            bytes => bytes,
        };
        let disk_rate = match request.bandwidth_max {
            0 => DISK_RATE_MIN,
            rate => rate.min(DISK_RATE_MIN),
        };
        let disk_time = Duration::from_secs(disk_bytes / disk_rate);
        let time_default = TOTAL_TIME_DEFAULT.saturating_add(disk_time).min(TOTAL_TIME_MAX);
        Ok(Self {
            downtime: duration("downtime", request.downtime, DOWNTIME_DEFAULT, DOWNTIME_MAX)?,
            rounds_max,
            bytes_max,
            total_time: duration("total_time", request.total_time, time_default, TOTAL_TIME_MAX)?,
            bandwidth_max: request.bandwidth_max,
        })
    }
}

/// What is known after a pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Passes so far.
    pub rounds: u32,
    /// Bytes of pages and of blocks that were written meanwhile.
    pub remaining: u64,
    /// The same after the pass before, if there was one.
    pub remaining_before: Option<u64>,
    /// Bytes sent so far.
    pub sent: u64,
    /// Time since the start.
    pub elapsed: Duration,
    /// Bytes a second.
    pub rate: u64,
}

/// Why the copy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The rest fits the pause.
    Converged,
    /// Too many passes.
    Rounds,
    /// Too many bytes.
    Bytes,
    /// Too long.
    Time,
}

impl Stop {
    /// As in `MigrationReport.stop_reason`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Converged => "CONVERGED",
            Self::Rounds => "ROUNDS",
            Self::Bytes => "BYTES",
            Self::Time => "TIME",
        }
    }
}

/// What to do after a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Another pass.
    Copy,
    /// Pause now, for this reason.
    SwitchOver(Stop),
    /// Give up: this limit is reached.
    GiveUp(Stop),
}

/// What to do after a pass over disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskDecision {
    /// Another pass over disks alone.
    Copy,
    /// On to memory; the rest goes along.
    Memory,
    /// Give up: this limit is reached.
    GiveUp(Stop),
}

/// Decides after a pass over disks alone, of which `remaining` were written meanwhile.
pub fn decide_disks(progress: &Progress, limits: &Limits) -> DiskDecision {
    if let Some(stop @ (Stop::Bytes | Stop::Time)) = limit_reached(progress, limits) {
        return DiskDecision::GiveUp(stop);
    }
    let rounds_max = DISK_ROUNDS_MAX.min(limits.rounds_max / DISK_ROUNDS_PART);
    let small = progress.remaining <= bytes_in(DISK_REST, progress.rate);
    if progress.rounds >= rounds_max || small || !shrinks(progress) {
        DiskDecision::Memory
    } else {
        DiskDecision::Copy
    }
}

/// Whether the last pass left a quarter less than the one before it.
fn shrinks(progress: &Progress) -> bool {
    progress.remaining_before.is_none_or(|before| progress.remaining < before / 4 * 3)
}

/// Decides after a pass over memory.
pub fn decide(progress: &Progress, limits: &Limits) -> Decision {
    let room = limits.downtime.saturating_sub(STATE_TIME).max(limits.downtime / 2);
    let budget = bytes_in(room, progress.rate);
    let fits = progress.remaining == 0 || progress.remaining <= budget;
    let over = limit_reached(progress, limits);
    if fits {
        let small = progress.remaining <= SMALL_BYTES;
        return if small || !shrinks(progress) || over.is_some() {
            Decision::SwitchOver(Stop::Converged)
        } else {
            Decision::Copy
        };
    }
    match over {
        None => Decision::Copy,
        Some(stop)
            if progress.remaining
                <= bytes_in(limits.downtime * PAUSE_AT_LIMIT_FACTOR, progress.rate) =>
        {
            Decision::SwitchOver(stop)
        }
        Some(stop) => Decision::GiveUp(stop),
    }
}

fn limit_reached(progress: &Progress, limits: &Limits) -> Option<Stop> {
    if progress.sent.saturating_add(progress.remaining) > limits.bytes_max {
        Some(Stop::Bytes)
    } else if progress.elapsed >= limits.total_time {
        Some(Stop::Time)
    } else if progress.rounds + 1 >= limits.rounds_max {
        Some(Stop::Rounds)
    } else {
        None
    }
}

/// How many bytes go over in this time.
fn bytes_in(time: Duration, rate: u64) -> u64 {
    u64::try_from(time.as_micros() * u128::from(rate) / 1_000_000).unwrap_or(u64::MAX)
}

/// The rate after a round: a round that was too small to tell leaves it as it was.
pub fn rate_after(rate: u64, bytes: u64, time: Duration) -> u64 {
    let micros = time.as_micros().max(1);
    if bytes < RATE_SAMPLE_BYTES && rate != 0 {
        return rate;
    }
    u64::try_from(u128::from(bytes) * 1_000_000 / micros).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits::from_request(None, 128 << 20, 0).unwrap()
    }

    fn after(rounds: u32, remaining: u64, before: Option<u64>) -> Progress {
        Progress {
            rounds,
            remaining,
            remaining_before: before,
            sent: 50 << 20,
            elapsed: Duration::from_secs(1),
            rate: 100 << 20,
        }
    }

    #[test]
    fn it_stops_when_the_rest_fits_and_does_not_shrink() {
        // 80 ms at 100 MiB/s are 8 MiB.
        assert_eq!(decide(&after(1, 20 << 20, None), &limits()), Decision::Copy);
        assert_eq!(decide(&after(2, 6 << 20, Some(20 << 20)), &limits()), Decision::Copy);
        assert_eq!(decide(&after(3, 2 << 20, Some(6 << 20)), &limits()), Decision::Copy);
        assert_eq!(
            decide(&after(4, 2 << 20, Some(2 << 20)), &limits()),
            Decision::SwitchOver(Stop::Converged)
        );
        assert_eq!(decide(&after(1, 0, None), &limits()), Decision::SwitchOver(Stop::Converged));
        assert_eq!(decide(&after(1, 4096, None), &limits()), Decision::SwitchOver(Stop::Converged));
    }

    #[test]
    fn a_limit_gives_up_rather_than_pausing_for_long() {
        // 400 ms at 100 MiB/s are 40 MiB.
        let much = 60 << 20;
        let limits = Limits { rounds_max: 5, ..limits() };
        assert_eq!(decide(&after(4, much, Some(much)), &limits), Decision::GiveUp(Stop::Rounds));
        let mut progress = after(1, much, None);
        progress.sent = limits.bytes_max;
        assert_eq!(decide(&progress, &limits), Decision::GiveUp(Stop::Bytes));
        progress.sent = 0;
        progress.elapsed = limits.total_time;
        assert_eq!(decide(&progress, &limits), Decision::GiveUp(Stop::Time));
        let some = Progress { remaining: 30 << 20, ..after(4, 0, Some(30 << 20)) };
        assert_eq!(decide(&some, &limits), Decision::SwitchOver(Stop::Rounds));
        // What fits is sent even then.
        assert_eq!(
            decide(&after(4, 2 << 20, Some(4 << 20)), &limits),
            Decision::SwitchOver(Stop::Converged)
        );
    }

    /// Whatever a guest does, the passes come to an end.
    #[test]
    fn no_guest_copies_for_ever() {
        let limits = limits();
        for remaining in [0, 4096, 1 << 20, 9 << 20, 128 << 20] {
            let mut before = None;
            let rounds = (1..).find(|rounds| {
                let progress = Progress { sent: 0, ..after(*rounds, remaining, before) };
                before = Some(remaining * 2);
                decide(&progress, &limits) != Decision::Copy
            });
            assert!(rounds.unwrap() < limits.rounds_max);
        }
    }

    #[test]
    fn limits_name_what_they_accept() {
        let ask =
            |rounds_max| drover_proto::v1::MigrationLimits { rounds_max, ..Default::default() };
        assert_eq!(Limits::from_request(Some(&ask(7)), 1, 0).unwrap().rounds_max, 7);
        assert_eq!(
            Limits::from_request(Some(&ask(1001)), 1, 0).unwrap_err(),
            "limits.rounds_max: 1001; accepted: 1 to 1000"
        );
        let downtime = Some(prost_types::Duration { seconds: 11, nanos: 0 });
        let ask = drover_proto::v1::MigrationLimits { downtime, ..Default::default() };
        assert_eq!(
            Limits::from_request(Some(&ask), 1, 0).unwrap_err(),
            "limits.downtime: 11s; accepted: at most 10s"
        );
    }

    /// Disks alone: as long as it helps, and no longer than the limits let it.
    #[test]
    fn disks_are_left_when_another_pass_would_not_help() {
        let limits = limits();
        let much = 4 << 30;
        let first = Progress { sent: 0, ..after(1, much, None) };
        let limits = Limits { bytes_max: u64::MAX, ..limits };
        assert_eq!(decide_disks(&first, &limits), DiskDecision::Copy);
        let less =
            Progress { rounds: 2, remaining: much / 2, remaining_before: Some(much), ..first };
        assert_eq!(decide_disks(&less, &limits), DiskDecision::Copy);
        let same = Progress { remaining: much / 10 * 9, ..less };
        assert_eq!(decide_disks(&same, &limits), DiskDecision::Memory);
        // A second at 100 MiB/s.
        let little = Progress { remaining: 100 << 20, ..first };
        assert_eq!(decide_disks(&little, &limits), DiskDecision::Memory);
        let many = Progress { rounds: DISK_ROUNDS_MAX, ..less };
        assert_eq!(decide_disks(&many, &limits), DiskDecision::Memory);
        let few = Limits { rounds_max: 2, ..limits };
        assert_eq!(decide_disks(&first, &few), DiskDecision::Memory, "a pass is left for memory");
        let late = Progress { elapsed: limits.total_time, ..first };
        assert_eq!(decide_disks(&late, &limits), DiskDecision::GiveUp(Stop::Time));
        let bytes = Limits { bytes_max: much - 1, ..limits };
        assert_eq!(decide_disks(&first, &bytes), DiskDecision::GiveUp(Stop::Bytes));
    }

    /// A large disk has its time unless somebody said otherwise.
    #[test]
    fn limits_grow_with_the_disks() {
        let disk_bytes = 100 << 30;
        let limits = Limits::from_request(None, 1 << 30, disk_bytes).unwrap();
        assert_eq!(limits.total_time, Duration::from_secs(600 + 10240));
        assert_eq!(limits.bytes_max, 8 * (101 << 30));
        let ask = |bandwidth_max, seconds| drover_proto::v1::MigrationLimits {
            bandwidth_max,
            total_time: Some(prost_types::Duration { seconds, nanos: 0 }),
            ..Default::default()
        };
        let slow = Limits::from_request(Some(&ask(5 << 20, 0)), 1 << 30, disk_bytes).unwrap();
        assert_eq!(slow.total_time, Duration::from_secs(600 + 20480));
        let said = Limits::from_request(Some(&ask(0, 9)), 1 << 30, disk_bytes).unwrap();
        assert_eq!(said.total_time, Duration::from_secs(9));
        let huge = Limits::from_request(None, 1 << 30, 1 << 50).unwrap();
        assert_eq!(huge.total_time, TOTAL_TIME_MAX);
    }

    #[test]
    fn small_rounds_do_not_change_the_rate() {
        assert_eq!(rate_after(0, 4096, Duration::from_secs(1)), 4096);
        assert_eq!(rate_after(1000, 4096, Duration::from_secs(1)), 1000);
        assert_eq!(rate_after(1000, 1 << 20, Duration::from_secs(1)), 1 << 20);
    }
}
