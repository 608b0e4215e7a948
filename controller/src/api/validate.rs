//! What requests may hold. Each refusal names the field, the value, and what is accepted.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use drover_proto::v1::{
    Boot, DomainSpec, DrainPolicy, MigrationLimits, NetworkInterface, RestartPolicy,
};

use super::errors::{excerpt, invalid};
use super::page::hex_byte;
use crate::model::{BadId, DomainId, NodeId, OperationId, World};
use crate::workflows::desired::duration as proto_duration;
use crate::workflows::{Context, Refusal};

const MIB: u64 = 1 << 20;
const VCPUS_MAX: u32 = 8;
const MEMORY_MIN: u64 = 32 * MIB;
const INTERFACES_MAX: usize = 4;
const ADDRESSES_MAX: usize = 16;
const PATH_BYTES_MAX: usize = 4095;
const COMMAND_LINE_BYTES_MAX: usize = 2047;
const BRIDGE_BYTES_MAX: usize = 15;
const LABELS_MAX: usize = 64;
const LABEL_KEY_BYTES_MAX: usize = 63;
const LABEL_VALUE_BYTES_MAX: usize = 255;
const DOWNTIME_DEFAULT: Duration = Duration::from_millis(100);
const DOWNTIME_MAX: Duration = Duration::from_secs(10);
const ROUNDS_DEFAULT: u32 = 30;
const ROUNDS_MAX: u32 = 1000;
const TOTAL_TIME_DEFAULT: Duration = Duration::from_secs(600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// `nodes/{id}` in a field.
pub(super) fn node(field: &str, name: &str) -> Result<NodeId, Refusal> {
    NodeId::from_name(name).map_err(|bad| bad_id(field, &bad))
}

/// The same, where empty means any.
pub(super) fn maybe_node(field: &str, name: &str) -> Result<Option<NodeId>, Refusal> {
    if name.is_empty() { Ok(None) } else { node(field, name).map(Some) }
}

/// `domains/{id}` in a field.
pub(super) fn domain(field: &str, name: &str) -> Result<DomainId, Refusal> {
    DomainId::from_name(name).map_err(|bad| bad_id(field, &bad))
}

/// `operations/{uuid}` in a field.
pub(super) fn operation(field: &str, name: &str) -> Result<OperationId, Refusal> {
    OperationId::from_name(name).map_err(|bad| bad_id(field, &bad))
}

/// What an event or an operation may be about; empty means anything.
pub(super) fn subject(field: &str, name: &str) -> Result<(), Refusal> {
    let known = name.is_empty()
        || name == "cluster"
        || NodeId::from_name(name).is_ok()
        || DomainId::from_name(name).is_ok()
        || OperationId::from_name(name).is_ok();
    if known {
        return Ok(());
    }
    Err(invalid(field, name, "nodes/{id}, domains/{id}, operations/{uuid} or cluster"))
}

fn bad_id(field: &str, bad: &BadId) -> Refusal {
    invalid(field, &bad.value, &bad.expected)
}

/// Checks a new domain's spec and fills in what was left out.
pub(super) fn spec(cx: &Context<'_>, given: Option<&DomainSpec>) -> Result<DomainSpec, Refusal> {
    let Some(given) = given else {
        return Err(invalid("domain.spec", "", "a spec with vcpus, memory_bytes and boot"));
    };
    let mut spec = given.clone();
    if !(1..=VCPUS_MAX).contains(&spec.vcpus) {
        let expected = format!("1 to {VCPUS_MAX}");
        return Err(invalid("domain.spec.vcpus", &spec.vcpus.to_string(), &expected));
    }
    if spec.memory_bytes < MEMORY_MIN || spec.memory_bytes % MIB != 0 {
        let expected = "a multiple of 1 MiB (1048576), at least 32 MiB (33554432)";
        return Err(invalid("domain.spec.memory_bytes", &spec.memory_bytes.to_string(), expected));
    }
    boot(spec.boot.as_ref())?;
    policy::<RestartPolicy>("domain.spec.on_reboot", spec.on_reboot)?;
    policy::<RestartPolicy>("domain.spec.on_crash", spec.on_crash)?;
    policy::<DrainPolicy>("domain.spec.drain_policy", spec.drain_policy)?;
    labels(&spec)?;
    interfaces(cx, &mut spec.interfaces)?;
    Ok(spec)
}

fn boot(boot: Option<&Boot>) -> Result<(), Refusal> {
    let boot = boot.cloned().unwrap_or_default();
    path("domain.spec.boot.kernel", &boot.kernel)?;
    if !boot.initramfs.is_empty() {
        path("domain.spec.boot.initramfs", &boot.initramfs)?;
    }
    let text = &boot.command_line;
    if text.len() > COMMAND_LINE_BYTES_MAX || text.chars().any(char::is_control) {
        let expected = format!("at most {COMMAND_LINE_BYTES_MAX} bytes of text in one line");
        return Err(invalid("domain.spec.boot.command_line", &excerpt(text), &expected));
    }
    Ok(())
}

fn path(field: &str, path: &str) -> Result<(), Refusal> {
    let fine = path.starts_with('/')
        && path.len() <= PATH_BYTES_MAX
        && !path.chars().any(char::is_control)
        && !path.split('/').any(|part| part == "..");
    if fine {
        return Ok(());
    }
    let expected = "an absolute path of a file on the node, without ..";
    Err(invalid(field, &excerpt(path), expected))
}

fn policy<T: TryFrom<i32>>(field: &str, value: i32) -> Result<(), Refusal> {
    match T::try_from(value) {
        Ok(_) => Ok(()),
        Err(_) => Err(invalid(field, &value.to_string(), "one of the enum's values")),
    }
}

fn labels(spec: &DomainSpec) -> Result<(), Refusal> {
    if spec.labels.len() > LABELS_MAX {
        let expected = format!("at most {LABELS_MAX} labels");
        return Err(invalid("domain.spec.labels", &spec.labels.len().to_string(), &expected));
    }
    for (key, value) in &spec.labels {
        let fine = (1..=LABEL_KEY_BYTES_MAX).contains(&key.len())
            && value.len() <= LABEL_VALUE_BYTES_MAX
            && !key.chars().chain(value.chars()).any(char::is_control);
        if !fine {
            let expected = format!(
                "keys of 1 to {LABEL_KEY_BYTES_MAX} bytes, values of at most \
                 {LABEL_VALUE_BYTES_MAX}"
            );
            return Err(invalid("domain.spec.labels", &excerpt(key), &expected));
        }
    }
    Ok(())
}

fn interfaces(cx: &Context<'_>, given: &mut [NetworkInterface]) -> Result<(), Refusal> {
    if given.len() > INTERFACES_MAX {
        let expected = format!("at most {INTERFACES_MAX}");
        return Err(invalid("domain.spec.interfaces", &given.len().to_string(), &expected));
    }
    let mut used = macs_in_use(cx.world);
    for (index, nic) in given.iter_mut().enumerate() {
        let field = |name: &str| format!("domain.spec.interfaces[{index}].{name}");
        if nic.mac.is_empty() {
            nic.mac = free_mac(cx, &used);
        } else {
            nic.mac = mac(&field("mac"), &nic.mac)?;
        }
        if !used.insert(nic.mac.clone()) {
            let expected = "an address that no other interface has; empty to have one chosen";
            return Err(invalid(&field("mac"), &nic.mac, expected));
        }
        let letters = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if nic.bridge.len() > BRIDGE_BYTES_MAX || !nic.bridge.chars().all(letters) {
            let expected = format!(
                "the name of a bridge on the node (at most {BRIDGE_BYTES_MAX} of letters, \
                 digits, '-', '_' and '.'), or empty for the agent's own"
            );
            return Err(invalid(&field("bridge"), &excerpt(&nic.bridge), &expected));
        }
        if nic.addresses.len() > ADDRESSES_MAX {
            let expected = format!("at most {ADDRESSES_MAX}");
            let given = nic.addresses.len().to_string();
            return Err(invalid(&field("addresses"), &given, &expected));
        }
        for (at, address) in nic.addresses.iter().enumerate() {
            if address.parse::<IpAddr>().is_err() {
                let field = field(&format!("addresses[{at}]"));
                let expected = "an IPv4 or IPv6 address without prefix length";
                return Err(invalid(&field, &excerpt(address), expected));
            }
        }
    }
    Ok(())
}

fn macs_in_use(world: &World) -> BTreeSet<String> {
    let specs = world.domains.values().filter_map(|row| row.value.spec.as_ref());
    specs.flat_map(|spec| spec.interfaces.iter().map(|nic| nic.mac.clone())).collect()
}

fn mac(field: &str, text: &str) -> Result<String, Refusal> {
    let bytes: Option<Vec<u8>> = text.split(':').map(hex_byte).collect();
    match bytes {
        Some(bytes)
            if bytes.len() == 6 && bytes[0] & 1 == 0 && bytes.iter().any(|byte| *byte != 0) =>
        {
            Ok(text.to_ascii_lowercase())
        }
        _ => {
            let expected = "a unicast address of the form 52:54:00:12:34:56, or empty";
            Err(invalid(field, &excerpt(text), expected))
        }
    }
}

/// From the range that KVM guests use; at random, so that nobody must be asked.
fn free_mac(cx: &Context<'_>, used: &BTreeSet<String>) -> String {
    loop {
        let random: String = cx.ids.uuid().chars().filter(char::is_ascii_hexdigit).collect();
        let mac = format!("52:54:00:{}:{}:{}", &random[0..2], &random[2..4], &random[4..6]);
        if !used.contains(&mac) {
            return mac;
        }
    }
}

/// Checks limits and fills in what was left out. `bytes_max` stays 0 where it depends on the
/// domain's memory: its agent knows that.
pub(super) fn limits(given: Option<&MigrationLimits>) -> Result<MigrationLimits, Refusal> {
    let given = given.copied().unwrap_or_default();
    let downtime =
        duration("limits.downtime", given.downtime.as_ref(), DOWNTIME_DEFAULT, DOWNTIME_MAX)?;
    let total_time =
        duration("limits.total_time", given.total_time.as_ref(), TOTAL_TIME_DEFAULT, DAY)?;
    if given.rounds_max > ROUNDS_MAX {
        let expected = format!("0 to {ROUNDS_MAX}; 0 means {ROUNDS_DEFAULT}");
        return Err(invalid("limits.rounds_max", &given.rounds_max.to_string(), &expected));
    }
    let rounds_max = if given.rounds_max == 0 { ROUNDS_DEFAULT } else { given.rounds_max };
    Ok(MigrationLimits {
        downtime: Some(to_proto(downtime)),
        rounds_max,
        total_time: Some(to_proto(total_time)),
        ..given
    })
}

/// A duration of the API: nothing or zero means the default.
pub(super) fn duration(
    field: &str,
    given: Option<&prost_types::Duration>,
    default: Duration,
    max: Duration,
) -> Result<Duration, Refusal> {
    let Some(given) = given.filter(|d| d.seconds != 0 || d.nanos != 0) else {
        return Ok(default);
    };
    match Duration::try_from(*given) {
        Ok(wanted) if wanted <= max => Ok(wanted),
        _ => {
            let expected = format!(
                "a duration above 0 and up to {} s; {} s when left out",
                max.as_secs_f64(),
                default.as_secs_f64()
            );
            let value = format!("{} s {} ns", given.seconds, given.nanos);
            Err(invalid(field, &value, &expected))
        }
    }
}

/// Milliseconds of a duration.
pub(super) fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn to_proto(duration: Duration) -> prost_types::Duration {
    // Shorter than a millisecond is as good as nothing, but nothing means the default.
    proto_duration(ms(duration).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_made_of_hex_digits_alone() {
        assert_eq!(mac("mac", "52:54:00:AB:00:01").unwrap(), "52:54:00:ab:00:01");
        for bad in
            ["52:54:00:+1:00:01", "52:54:00:-1:00:01", "52:54:00:é:00:01", "52:54:00:1:00:01"]
        {
            assert!(mac("mac", bad).is_err(), "{bad}");
        }
    }
}
