//! Sizes, durations, ages and names as people read them.

use std::time::{Duration, SystemTime};

use drover_proto::v1::{Operation, OperationKind};

/// The last part of a resource's name: `domains/web1` is `web1`.
pub(crate) fn short(name: &str) -> &str {
    name.split_once('/').map_or(name, |(_, id)| id)
}

/// The same, with `-` for an empty name.
pub(crate) fn short_or_dash(name: &str) -> String {
    or_dash(short(name))
}

/// `-` for an empty text.
pub(crate) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// `512 MiB`, `1.5 GiB`: whole numbers where they are exact, else one decimal.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() == 0.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// `0 s`, `85.3 ms`, `4.2 s`, `1 min 20 s`, `3 h 5 min`.
pub(crate) fn time(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 if duration.is_zero() => "0 s".to_owned(),
        0 => format!("{:.1} ms", duration.as_secs_f64() * 1000.0),
        1..60 => format!("{:.1} s", duration.as_secs_f64()),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// Microseconds as [`time`].
pub(crate) fn time_us(us: u64) -> String {
    time(Duration::from_micros(us))
}

/// A duration of the API as [`time`]; `-` when there is none.
pub(crate) fn time_of(duration: Option<&prost_types::Duration>) -> String {
    let duration = duration.and_then(|d| Duration::try_from(*d).ok());
    duration.map_or_else(|| "-".to_owned(), time)
}

/// How long ago: `12s`, `5m`, `3h`, `2d`; `-` when it never was.
pub(crate) fn age(then: Option<&prost_types::Timestamp>, now: SystemTime) -> String {
    let Some(elapsed) = elapsed(then, now) else { return "-".to_owned() };
    let seconds = elapsed.as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// The time since then; zero when a clock that is ahead of ours wrote it.
pub(crate) fn elapsed(then: Option<&prost_types::Timestamp>, now: SystemTime) -> Option<Duration> {
    let then = SystemTime::try_from(*then?).ok()?;
    Some(now.duration_since(then).unwrap_or_default())
}

/// `65,123`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 domain`, `2 domains`.
pub(crate) fn plural(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// The short name of an enum's value: `DOMAIN_STATE_RUNNING` is `running`, given the prefix
/// `DOMAIN_STATE_`; `-` when unset.
pub(crate) fn enum_name(value: &str, prefix: &str) -> String {
    match value.strip_prefix(prefix).unwrap_or(value) {
        "UNSPECIFIED" => "-".to_owned(),
        name => name.to_ascii_lowercase().replace('_', "-"),
    }
}

/// What an operation is, for people: `migrate domain web1`.
pub(crate) fn operation_title(operation: &Operation) -> String {
    let target = short(&operation.target);
    match operation.kind() {
        OperationKind::Unspecified => operation.name.clone(),
        OperationKind::CreateDomain => format!("create domain {target}"),
        OperationKind::StartDomain => format!("start domain {target}"),
        OperationKind::StopDomain => format!("stop domain {target}"),
        OperationKind::DeleteDomain => format!("delete domain {target}"),
        OperationKind::MigrateDomain => format!("migrate domain {target}"),
        OperationKind::DrainNode => format!("drain node {target}"),
        OperationKind::ResizeDomain => format!("resize domain {target}"),
        OperationKind::ReinstallDomain => format!("reinstall domain {target}"),
        OperationKind::RescueDomain => format!("rescue domain {target}"),
        OperationKind::EndRescue => format!("end rescue of domain {target}"),
        OperationKind::SaveDomain => format!("save domain {target}"),
        // Their target is the domain whose disks they work on, or the snapshot itself.
        OperationKind::CreateSnapshot => format!("snapshot {target}"),
        OperationKind::RestoreSnapshot => format!("restore snapshot of {target}"),
        OperationKind::CreateVolume => format!("create volume {target}"),
        OperationKind::AttachVolume => format!("attach a volume to domain {target}"),
        OperationKind::DetachVolume => format!("detach a volume from domain {target}"),
        OperationKind::BalanceCluster => "balance cluster".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(512 << 20), "512 MiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(size(u64::MAX), "16384 PiB");
    }

    #[test]
    fn times_are_short() {
        assert_eq!(time_us(85_300), "85.3 ms");
        assert_eq!(time_us(4_200_000), "4.2 s");
        assert_eq!(time(Duration::from_secs(80)), "1 min 20 s");
        assert_eq!(time(Duration::from_secs(11_100)), "3 h 5 min");
        assert_eq!(time_of(None), "-");
    }

    #[test]
    fn ages_count_from_now_and_never_back() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        assert_eq!(age(at(999_988).as_ref(), now), "12s");
        assert_eq!(age(at(999_000).as_ref(), now), "16m");
        assert_eq!(age(at(1_000_500).as_ref(), now), "0s");
        assert_eq!(age(at(0).as_ref(), now), "11d");
        assert_eq!(age(None, now), "-");
    }

    #[test]
    fn words() {
        assert_eq!(count(65_123), "65,123");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_000_000), "1,000,000");
        assert_eq!(enum_name("MIGRATION_PHASE_HANDED_OVER", "MIGRATION_PHASE_"), "handed-over");
        assert_eq!(enum_name("DOMAIN_STATE_UNSPECIFIED", "DOMAIN_STATE_"), "-");
        assert_eq!(short("nodes/host1"), "host1");
        assert_eq!(short("cluster"), "cluster");
        assert_eq!(plural(1, "domain"), "1 domain");
    }
}
