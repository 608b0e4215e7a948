//! What requests may hold. Each refusal names the field, the value, and what is accepted.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use drover_proto::v1::{
    Boot, CloudInit, Disk, DiskLimits, DomainSpec, DrainPolicy, MigrationLimits, Network,
    NetworkInterface, ResizeDomainRequest, RestartPolicy,
};

use super::errors::{excerpt, invalid};
use super::page::hex_byte;
use crate::model::{
    BadId, DomainId, ID_SYNTAX, ImageId, NetworkId, NodeId, OperationId, SnapshotId, VolumeId,
    World,
};
use crate::workflows::desired::duration as proto_duration;
use crate::workflows::resize::Resize;
use crate::workflows::{Context, Refusal, network};

const MIB: u64 = 1 << 20;
const VCPUS_MAX: u32 = 8;
const MEMORY_MIN: u64 = 32 * MIB;
const INTERFACES_MAX: usize = 4;
const ADDRESSES_MAX: usize = 16;
const PATH_BYTES_MAX: usize = 4095;
const COMMAND_LINE_BYTES_MAX: usize = 2047;
const BRIDGE_BYTES_MAX: usize = 15;
/// The eighth is the seed.
const DISKS_MAX: usize = 7;
const DISK_BYTES_MAX: u64 = 16 << 40;
const SSH_KEYS_MAX: usize = 32;
const SSH_KEY_BYTES_MAX: usize = 16 << 10;
const USER_DATA_BYTES_MAX: usize = 64 << 10;
const NAME_SERVERS_MAX: usize = 4;
const LABELS_MAX: usize = 64;
const LABEL_KEY_BYTES_MAX: usize = 63;
const LABEL_VALUE_BYTES_MAX: usize = 255;
const DOWNTIME_DEFAULT: Duration = Duration::from_millis(100);
const DOWNTIME_MAX: Duration = Duration::from_secs(10);
const ROUNDS_DEFAULT: u32 = 30;
const ROUNDS_MAX: u32 = 1000;
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

/// `volumes/{id}` in a field.
pub(super) fn volume(field: &str, name: &str) -> Result<VolumeId, Refusal> {
    VolumeId::from_name(name).map_err(|bad| bad_id(field, &bad))
}

/// `snapshots/{id}` in a field.
pub(super) fn snapshot(field: &str, name: &str) -> Result<SnapshotId, Refusal> {
    SnapshotId::from_name(name).map_err(|bad| bad_id(field, &bad))
}

/// `images/{id}` in a field.
pub(super) fn image(field: &str, name: &str) -> Result<ImageId, Refusal> {
    ImageId::from_name(name).map_err(|bad| bad_id(field, &bad))
}

/// `networks/{id}` in a field.
pub(super) fn network_id(field: &str, name: &str) -> Result<NetworkId, Refusal> {
    NetworkId::from_name(name).map_err(|bad| bad_id(field, &bad))
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
        || VolumeId::from_name(name).is_ok()
        || OperationId::from_name(name).is_ok();
    if known {
        return Ok(());
    }
    Err(invalid(
        field,
        name,
        "nodes/{id}, domains/{id}, volumes/{id}, operations/{uuid} or cluster",
    ))
}

fn bad_id(field: &str, bad: &BadId) -> Refusal {
    invalid(field, &bad.value, &bad.expected)
}

/// Checks a new domain's spec and fills in what was left out.
///
/// The networks are those whose addresses it was given.
pub(super) fn spec(
    cx: &Context<'_>,
    given: Option<&DomainSpec>,
) -> Result<(DomainSpec, BTreeSet<NetworkId>), Refusal> {
    let Some(given) = given else {
        return Err(invalid("domain.spec", "", "a spec with vcpus, memory_bytes and boot"));
    };
    let mut spec = given.clone();
    vcpus("domain.spec.vcpus", spec.vcpus)?;
    memory("domain.spec.memory_bytes", spec.memory_bytes)?;
    boot(spec.boot.as_ref(), !spec.disks.is_empty())?;
    policy::<RestartPolicy>("domain.spec.on_reboot", spec.on_reboot)?;
    policy::<RestartPolicy>("domain.spec.on_crash", spec.on_crash)?;
    policy::<DrainPolicy>("domain.spec.drain_policy", spec.drain_policy)?;
    labels(&spec)?;
    disks(&spec.disks)?;
    if let Some(cloud_init) = &spec.cloud_init {
        self::cloud_init(cloud_init)?;
    }
    let networks = interfaces(cx, &mut spec.interfaces)?;
    Ok((spec, networks))
}

fn vcpus(field: &str, given: u32) -> Result<(), Refusal> {
    match given {
        1..=VCPUS_MAX => Ok(()),
        _ => Err(invalid(field, &given.to_string(), &format!("1 to {VCPUS_MAX}"))),
    }
}

fn memory(field: &str, given: u64) -> Result<(), Refusal> {
    if given >= MEMORY_MIN && given.is_multiple_of(MIB) {
        return Ok(());
    }
    let expected = "a multiple of 1 MiB (1048576), at least 32 MiB (33554432)";
    Err(invalid(field, &given.to_string(), expected))
}

fn disk_size(field: &str, given: u64, zero: &str) -> Result<(), Refusal> {
    if given.is_multiple_of(MIB) && given <= DISK_BYTES_MAX {
        return Ok(());
    }
    let expected = format!("a multiple of 1 MiB (1048576), at most 16 TiB; 0 for {zero}");
    Err(invalid(field, &given.to_string(), &expected))
}

/// What a domain shall be given; whether it fits it is not known here.
pub(super) fn resize(given: &ResizeDomainRequest) -> Result<Resize, Refusal> {
    if given.vcpus == 0 && given.memory_bytes == 0 && given.disks.is_empty() {
        let expected = "a change: one of vcpus, memory_bytes and disks at least";
        return Err(invalid("vcpus", "0", expected));
    }
    if given.vcpus != 0 {
        vcpus("vcpus", given.vcpus)?;
    }
    if given.memory_bytes != 0 {
        memory("memory_bytes", given.memory_bytes)?;
    }
    if given.disks.len() > DISKS_MAX {
        let expected = format!("at most {DISKS_MAX}");
        return Err(invalid("disks", &given.disks.len().to_string(), &expected));
    }
    for (index, disk) in given.disks.iter().enumerate() {
        let field = |name: &str| format!("disks[{index}].{name}");
        if given.disks[..index].iter().any(|before| before.disk == disk.disk) {
            let expected = "each disk at most once";
            return Err(invalid(&field("disk"), &disk.disk.to_string(), expected));
        }
        disk_size(&field("size_bytes"), disk.size_bytes, "no change")?;
        match &disk.limits {
            Some(limits) => disk_limits(&field("limits"), limits)?,
            None if disk.size_bytes == 0 => {
                let expected = "a size, or limits: nothing is to be changed";
                return Err(invalid(&field("size_bytes"), "0", expected));
            }
            None => {}
        }
    }
    let ResizeDomainRequest { vcpus, memory_bytes, disks, .. } = given.clone();
    Ok(Resize { vcpus, memory_bytes, disks })
}

fn boot(boot: Option<&Boot>, has_disks: bool) -> Result<(), Refusal> {
    let boot = boot.cloned().unwrap_or_default();
    if !boot.kernel.is_empty() {
        path("domain.spec.boot.kernel", &boot.kernel)?;
    } else if !has_disks {
        let expected = "an absolute path of a file on the node; empty with a disk to boot from";
        return Err(invalid("domain.spec.boot.kernel", "", expected));
    } else if !boot.initramfs.is_empty() {
        let expected = "none without a kernel: the disk has its own";
        return Err(invalid("domain.spec.boot.initramfs", &excerpt(&boot.initramfs), expected));
    }
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

fn disks(given: &[Disk]) -> Result<(), Refusal> {
    if given.len() > DISKS_MAX {
        let expected = format!("at most {DISKS_MAX}");
        return Err(invalid("domain.spec.disks", &given.len().to_string(), &expected));
    }
    for (index, disk) in given.iter().enumerate() {
        let field = |name: &str| format!("domain.spec.disks[{index}].{name}");
        if !disk.volume.is_empty() {
            let expected = "empty: a new volume is made";
            return Err(invalid(&field("volume"), &excerpt(&disk.volume), expected));
        }
        let at = format!("domain.spec.disks[{index}]");
        volume_spec(&at, &disk.pool, disk.size_bytes, &disk.image)?;
        if let Some(limits) = &disk.limits {
            disk_limits(&field("limits"), limits)?;
        }
    }
    Ok(())
}

/// Pool, size and image of a new volume; `at` is where they stand in the request.
pub(super) fn volume_spec(
    at: &str,
    pool: &str,
    size_bytes: u64,
    image: &str,
) -> Result<(), Refusal> {
    if !pool.is_empty() && NodeId::parse(pool).is_err() {
        let expected = format!("a pool's id ({ID_SYNTAX}), or empty for a node's first");
        return Err(invalid(&format!("{at}.pool"), &excerpt(pool), &expected));
    }
    disk_size(&format!("{at}.size_bytes"), size_bytes, "the image's size")?;
    if !image.is_empty() {
        self::image(&format!("{at}.image"), image)?;
    }
    Ok(())
}

/// What a VMM would refuse when the domain starts (hv/src/config/disk.rs).
pub(super) fn disk_limits(field: &str, limits: &DiskLimits) -> Result<(), Refusal> {
    let requests = (limits.requests_per_second, 1..=100_000_000, limits.requests_burst, 1 << 30);
    let bytes = (limits.bytes_per_second, 64 << 10..=1 << 40, limits.bytes_burst, 1 << 50);
    for (name, (rate, rates, burst, burst_max)) in [("requests", requests), ("bytes", bytes)] {
        let invalid = |what: &str, value: u64, expected: &str| {
            Err(invalid(&format!("{field}.{name}_{what}"), &value.to_string(), expected))
        };
        if rate != 0 && !rates.contains(&rate) {
            let expected = format!("0 (no limit), or {} to {}", rates.start(), rates.end());
            return invalid("per_second", rate, &expected);
        }
        if burst > burst_max || (rate == 0 && burst != 0) {
            let expected = format!("at most {burst_max}, and 0 without {name}_per_second");
            return invalid("burst", burst, &expected);
        }
    }
    Ok(())
}

fn cloud_init(given: &CloudInit) -> Result<(), Refusal> {
    let host_name = &given.host_name;
    let label = |part: &str| NodeId::parse(part).is_ok();
    if !host_name.is_empty() && (host_name.len() > 253 || !host_name.split('.').all(label)) {
        let expected = "a host name: labels of a-z, 0-9 and '-', joined by dots; or empty";
        return Err(invalid("domain.spec.cloud_init.host_name", &excerpt(host_name), expected));
    }
    let keys = &given.ssh_authorized_keys;
    let fine = |key: &String| {
        key.len() <= SSH_KEY_BYTES_MAX
            && key.split_whitespace().count() >= 2
            && !key.chars().any(char::is_control)
    };
    let bad = keys.iter().find(|key| !fine(key));
    if keys.len() > SSH_KEYS_MAX || bad.is_some() {
        let expected = format!(
            "at most {SSH_KEYS_MAX} public keys, each one line as in authorized_keys of at most \
             {SSH_KEY_BYTES_MAX} bytes"
        );
        let value = bad.map_or_else(|| keys.len().to_string(), |key| excerpt(key));
        return Err(invalid("domain.spec.cloud_init.ssh_authorized_keys", &value, &expected));
    }
    if given.user_data.len() > USER_DATA_BYTES_MAX {
        let value = format!("{} bytes", given.user_data.len());
        let expected = format!("at most {USER_DATA_BYTES_MAX} bytes");
        return Err(invalid("domain.spec.cloud_init.user_data", &value, &expected));
    }
    Ok(())
}

fn interfaces(
    cx: &Context<'_>,
    given: &mut [NetworkInterface],
) -> Result<BTreeSet<NetworkId>, Refusal> {
    if given.len() > INTERFACES_MAX {
        let expected = format!("at most {INTERFACES_MAX}");
        return Err(invalid("domain.spec.interfaces", &given.len().to_string(), &expected));
    }
    let mut used = macs_in_use(cx.world);
    let (mut networks, mut addresses) = (BTreeSet::new(), BTreeSet::new());
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
        bridge(&field("bridge"), &nic.bridge)?;
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
        (nic.prefix_length, nic.gateway, nic.name_servers) = Default::default();
        if !nic.network.is_empty() {
            let field = format!("domain.spec.interfaces[{index}]");
            networks.insert(network::complete(cx.world, &field, nic, &mut addresses)?);
        }
    }
    Ok(networks)
}

/// A new network, checked and in its canonical form.
pub(super) fn network(given: Option<&Network>) -> Result<Network, Refusal> {
    let given = given.cloned().unwrap_or_default();
    let Some((base, prefix)) = network::subnet(&given.subnet) else {
        let expected = "an IPv4 subnet such as 10.78.0.0/24, from /16 to /30, without host bits";
        return Err(invalid("network.subnet", &excerpt(&given.subnet), expected));
    };
    let size = 1_u32 << (32 - u32::from(prefix));
    let (lowest, highest) = (u32::from(base) + 1, u32::from(base) + size - 2);
    let inside = |field: &str, text: &str| match text.parse::<Ipv4Addr>() {
        _ if text.is_empty() => Ok(String::new()),
        Ok(address) if (lowest..=highest).contains(&u32::from(address)) => Ok(address.to_string()),
        _ => {
            let (lowest, highest) = (Ipv4Addr::from(lowest), Ipv4Addr::from(highest));
            let expected = format!("an address from {lowest} to {highest}, or empty");
            Err(invalid(field, &excerpt(text), &expected))
        }
    };
    if given.name_servers.len() > NAME_SERVERS_MAX {
        let expected = format!("at most {NAME_SERVERS_MAX}");
        let value = given.name_servers.len().to_string();
        return Err(invalid("network.name_servers", &value, &expected));
    }
    if let Some(bad) = given.name_servers.iter().find(|text| text.parse::<IpAddr>().is_err()) {
        return Err(invalid("network.name_servers", &excerpt(bad), "IP addresses"));
    }
    bridge("network.bridge", &given.bridge)?;
    let network = Network {
        subnet: given.subnet,
        gateway: inside("network.gateway", &given.gateway)?,
        first_address: inside("network.first_address", &given.first_address)?,
        last_address: inside("network.last_address", &given.last_address)?,
        name_servers: given.name_servers,
        bridge: given.bridge,
        ..Network::default()
    };
    match network::range(&network) {
        Some((first, last)) if first <= last => Ok(network),
        _ => {
            let expected = "an address that is not before first_address";
            Err(invalid("network.last_address", &network.last_address, expected))
        }
    }
}

fn bridge(field: &str, name: &str) -> Result<(), Refusal> {
    let letters = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.len() <= BRIDGE_BYTES_MAX && name.chars().all(letters) {
        return Ok(());
    }
    let expected = format!(
        "the name of a bridge on the node (at most {BRIDGE_BYTES_MAX} of letters, digits, '-', \
         '_' and '.'), or empty for the agent's own"
    );
    Err(invalid(field, &excerpt(name), &expected))
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

/// Checks limits and fills in what was left out, but for what depends on the domain: `bytes_max`
/// on its memory (its agent knows that), `total_time` on its disks.
pub(super) fn limits(given: Option<&MigrationLimits>) -> Result<MigrationLimits, Refusal> {
    let given = given.copied().unwrap_or_default();
    let downtime =
        duration("limits.downtime", given.downtime.as_ref(), DOWNTIME_DEFAULT, DOWNTIME_MAX)?;
    // The default depends on the domain's disks.
    let total_time = given.total_time.as_ref().filter(|d| d.seconds != 0 || d.nanos != 0);
    let total_time =
        total_time.map(|given| duration("limits.total_time", Some(given), DAY, DAY)).transpose()?;
    if given.rounds_max > ROUNDS_MAX {
        let expected = format!("0 to {ROUNDS_MAX}; 0 means {ROUNDS_DEFAULT}");
        return Err(invalid("limits.rounds_max", &given.rounds_max.to_string(), &expected));
    }
    let rounds_max = if given.rounds_max == 0 { ROUNDS_DEFAULT } else { given.rounds_max };
    Ok(MigrationLimits {
        downtime: Some(to_proto(downtime)),
        rounds_max,
        total_time: total_time.map(to_proto),
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
            let value = match given.nanos {
                0 => format!("{} s", given.seconds),
                nanos => format!("{} s {nanos} ns", given.seconds),
            };
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
    fn limits_that_no_disk_can_have_are_refused() {
        let fine =
            DiskLimits { requests_per_second: 500, requests_burst: 1, ..DiskLimits::default() };
        assert_eq!(disk_limits("limits", &fine), Ok(()));
        for (field, limits) in [
            ("bytes_per_second", DiskLimits { bytes_per_second: 1, ..fine }),
            ("bytes_burst", DiskLimits { bytes_burst: 1, ..fine }),
            ("requests_per_second", DiskLimits { requests_per_second: u64::MAX, ..fine }),
            ("requests_burst", DiskLimits { requests_burst: u64::MAX, ..fine }),
        ] {
            let refused = disk_limits("limits", &limits).unwrap_err().to_string();
            assert!(refused.starts_with(&format!("limits.{field}: ")), "{refused}");
        }
    }

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
