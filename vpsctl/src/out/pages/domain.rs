//! Domains.

use std::time::SystemTime;

use drover_proto::v1::{CloudInit, Disk, Domain, DomainSpec, Guest, NetworkInterface};

use super::{Page, cores, with_reason};
use crate::out::{
    human::{age, enum_name, or_dash, plural, short, short_or_dash, size, time_of},
    table::Table,
};

/// The domains and where they run.
pub(crate) fn domains(domains: &[Domain], now: SystemTime) -> String {
    let mut table =
        Table::new(&["NAME", "STATE", "NODE", "VCPUS", "MEMORY", "ADDRESSES", "AGE", "REASON"]);
    for domain in domains {
        let spec = domain.spec.clone().unwrap_or_default();
        table.row(vec![
            short(&domain.name).to_owned(),
            state_text(domain),
            short_or_dash(&domain.node),
            spec.vcpus.to_string(),
            size(spec.memory_bytes),
            or_dash(&domain.addresses.join(" ")),
            age(domain.create_time.as_ref(), now),
            domain.state_reason.clone(),
        ]);
    }
    table.render()
}

/// One domain, and how its node was chosen.
pub(crate) fn domain(domain: &Domain, now: SystemTime) -> String {
    let spec = domain.spec.clone().unwrap_or_default();
    let boot = spec.boot.clone().unwrap_or_default();
    let mut page = Page::default();
    page.line("domain", short(&domain.name));
    page.line("state", &with_reason(&state_text(domain), &domain.state_reason));
    page.line("rescue", &rescue_text(domain));
    page.line("node", &format!("{}, epoch {}", short_or_dash(&domain.node), domain.epoch));
    page.line("wanted", &enum_name(domain.desired_power().as_str_name(), "POWER_STATE_"));
    page.line("size", &format!("{} vCPU, {}", spec.vcpus, size(spec.memory_bytes)));
    page.line("next start", &next_text(domain, &spec));
    page.line("addresses", &domain.addresses.join(" "));
    for disk in &spec.disks {
        page.line("disk", &disk_text(disk));
    }
    for interface in &spec.interfaces {
        page.line("interface", &interface_text(interface));
    }
    page.line("seed", &spec.cloud_init.as_ref().map(seed_text).unwrap_or_default());
    let kernel = if boot.kernel.is_empty() { "the first disk's" } else { &boot.kernel };
    page.line("kernel", kernel);
    page.line("initramfs", &boot.initramfs);
    page.line("command line", &boot.command_line);
    page.line("drain policy", &enum_name(spec.drain_policy().as_str_name(), "DRAIN_POLICY_"));
    if let Some(usage) = &domain.usage {
        let memory = size(usage.memory_resident_bytes);
        let uptime = time_of(usage.uptime.as_ref());
        page.line("measured", &format!("{}, {memory}, up {uptime}", cores(usage.cpu_millicores)));
    }
    page.line("last exit", &enum_name(domain.last_exit().as_str_name(), "EXIT_REASON_"));
    for (key, value) in &spec.labels {
        page.line("label", &format!("{key}={value}"));
    }
    page.line("operation", short(&domain.operation));
    page.line("created", &format!("{} ago", age(domain.create_time.as_ref(), now)));
    page.line("uid", &domain.uid);
    page.line("generation", &domain.generation_id);
    if let Some(placement) = &domain.placement {
        let when = age(placement.time.as_ref(), now);
        let chosen = short_or_dash(&placement.node);
        page.line("placed", &format!("{chosen}, score {:.3}, {when} ago", placement.score));
        for rejected in &placement.rejected {
            page.line("not", &format!("{}: {}", short(&rejected.node), rejected.reason));
        }
    }
    page.text
}

/// `running`, or `running (rescue)`.
fn state_text(domain: &Domain) -> String {
    let state = enum_name(domain.state().as_str_name(), "DOMAIN_STATE_");
    if domain.rescue_image.is_empty() { state } else { format!("{state} (rescue)") }
}

fn rescue_text(domain: &Domain) -> String {
    match short(&domain.rescue_image) {
        "" => String::new(),
        image => format!("boots {image}, its own disks behind it"),
    }
}

/// `4 vCPU, 8 GiB`, where that is another size than now.
fn next_text(domain: &Domain, spec: &DomainSpec) -> String {
    let or = |next, now| if next == 0 { now } else { next };
    let vcpus = or(domain.next_vcpus, spec.vcpus);
    let memory = match domain.next_memory_bytes {
        0 => spec.memory_bytes,
        next => next,
    };
    match (vcpus, memory) == (spec.vcpus, spec.memory_bytes) {
        true => String::new(),
        false => format!("{vcpus} vCPU, {}", size(memory)),
    }
}

/// What a guest says of itself. Its words may hold anything: what would move the cursor is left
/// out.
pub(crate) fn guest(domain: &str, guest: &Guest) -> String {
    let plain = |text: &str| text.chars().filter(|c| !c.is_control()).collect::<String>();
    let mut page = Page::default();
    page.line("domain", short(domain));
    page.line("host name", &plain(&guest.host_name));
    page.line("system", &plain(&guest.operating_system));
    page.line("kernel", &plain(&guest.kernel));
    for interface in &guest.interfaces {
        let mac = if interface.mac.is_empty() { "" } else { &format!(" {}", interface.mac) };
        let text = format!("{}{mac}", interface.name);
        page.line("interface", &plain(&with_reason(&text, &interface.addresses.join(", "))));
    }
    page.text
}

/// `web1-0: 10 GiB in ssd, from debian13, read-only, 500 requests/s`.
fn disk_text(disk: &Disk) -> String {
    let size = match disk.size_bytes {
        0 => "the image's size".to_owned(),
        bytes => size(bytes),
    };
    let pool = if disk.pool.is_empty() { "the node's first pool" } else { &disk.pool };
    let mut parts = vec![format!("{}: {size} in {pool}", short_or_dash(&disk.volume))];
    parts.push(match disk.image.as_str() {
        "" => "made blank".to_owned(),
        image => format!("from {}", short(image)),
    });
    if disk.read_only {
        parts.push("read-only".to_owned());
    }
    let limits = disk.limits.unwrap_or_default();
    if limits.requests_per_second > 0 {
        parts.push(format!("{} requests/s", limits.requests_per_second));
    }
    if limits.bytes_per_second > 0 {
        parts.push(format!("{}/s", self::size(limits.bytes_per_second)));
    }
    parts.join(", ")
}

/// `52:54:00:00:00:01 in lan on br0: 10.0.0.5/24, gateway 10.0.0.1`.
fn interface_text(interface: &NetworkInterface) -> String {
    let mut text = or_dash(&interface.mac);
    if !interface.network.is_empty() {
        text = format!("{text} in {}", short(&interface.network));
    }
    let bridge = if interface.bridge.is_empty() { "the node's bridge" } else { &interface.bridge };
    let prefix = match interface.prefix_length {
        0 => String::new(),
        length => format!("/{length}"),
    };
    let mut parts: Vec<_> = interface.addresses.iter().map(|a| format!("{a}{prefix}")).collect();
    if !interface.gateway.is_empty() {
        parts.push(format!("gateway {}", interface.gateway));
    }
    if !interface.name_servers.is_empty() {
        parts.push(format!("name servers {}", interface.name_servers.join(" ")));
    }
    with_reason(&format!("{text} on {bridge}"), &parts.join(", "))
}

/// What the seed says, not its secrets: `host name web1, 2 SSH keys, 1.2 KiB of user data`.
fn seed_text(seed: &CloudInit) -> String {
    let mut parts = Vec::new();
    if !seed.host_name.is_empty() {
        parts.push(format!("host name {}", seed.host_name));
    }
    parts.push(plural(seed.ssh_authorized_keys.len(), "SSH key"));
    if !seed.user_data.is_empty() {
        parts.push(format!("{} of user data", size(seed.user_data.len() as u64)));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_proto::v1::{DiskLimits, DomainState, GuestInterface};

    /// What differs from a plain domain is seen, and only then.
    #[test]
    fn a_domain_shows_rescue_and_its_next_size() {
        let spec = DomainSpec { vcpus: 2, memory_bytes: 1 << 30, ..DomainSpec::default() };
        let mut plain =
            Domain { name: "domains/web1".to_owned(), spec: Some(spec), ..Domain::default() };
        plain.set_state(DomainState::Saved);
        let text = domain(&plain, SystemTime::UNIX_EPOCH);
        assert!(text.contains("state         saved\n"), "{text}");
        assert!(!text.contains("rescue") && !text.contains("next start"), "{text}");
        let mut changed = Domain {
            rescue_image: "images/rescue".to_owned(),
            next_memory_bytes: 4 << 30,
            ..plain.clone()
        };
        changed.set_state(DomainState::Running);
        let text = domain(&changed, SystemTime::UNIX_EPOCH);
        for line in [
            "state         running (rescue)",
            "rescue        boots rescue, its own disks behind it",
            "next start    2 vCPU, 4 GiB",
        ] {
            assert!(text.lines().any(|l| l == line), "no \"{line}\" in\n{text}");
        }
        assert!(domains(&[changed], SystemTime::UNIX_EPOCH).contains("running (rescue)"));
    }

    /// A guest cannot write to the operator's terminal.
    #[test]
    fn a_guests_words_are_made_plain() {
        let interface = GuestInterface {
            name: "ens3".to_owned(),
            mac: "52:54:00:00:00:01".to_owned(),
            addresses: vec!["10.0.0.5/24".to_owned(), "fe80::1/64".to_owned()],
        };
        let said = Guest {
            host_name: "web\u{1b}[2J1\n".to_owned(),
            interfaces: vec![interface],
            ..Guest::default()
        };
        let text = guest("domains/web1", &said);
        assert_eq!(
            text,
            "domain        web1\nhost name     web[2J1\n\
             interface     ens3 52:54:00:00:00:01: 10.0.0.5/24, fe80::1/64\n"
        );
    }

    /// A page as an operator reads it: where each disk lies, and each address.
    #[test]
    fn a_domain_shows_its_disks_and_networks() {
        let root = Disk {
            volume: "volumes/web1-0".to_owned(),
            pool: "ssd".to_owned(),
            size_bytes: 10 << 30,
            image: "images/debian13".to_owned(),
            ..Disk::default()
        };
        let data = Disk {
            volume: "volumes/web1-1".to_owned(),
            size_bytes: 5 << 30,
            read_only: true,
            limits: Some(DiskLimits {
                requests_per_second: 500,
                bytes_per_second: 100 << 20,
                ..DiskLimits::default()
            }),
            ..Disk::default()
        };
        let lan = NetworkInterface {
            mac: "52:54:00:00:00:01".to_owned(),
            bridge: "br0".to_owned(),
            addresses: vec!["10.0.0.5".to_owned()],
            network: "networks/lan".to_owned(),
            prefix_length: 24,
            gateway: "10.0.0.1".to_owned(),
            name_servers: vec!["10.0.0.53".to_owned()],
        };
        let bare = NetworkInterface { mac: "52:54:00:00:00:02".to_owned(), ..Default::default() };
        let seed = CloudInit {
            host_name: "www".to_owned(),
            ssh_authorized_keys: vec!["ssh-ed25519 AAAA".to_owned()],
            user_data: "#cloud-config\npassword: secret\n".to_owned(),
        };
        let domain_with_all = Domain {
            name: "domains/web1".to_owned(),
            spec: Some(DomainSpec {
                disks: vec![root, data],
                interfaces: vec![lan, bare],
                cloud_init: Some(seed),
                ..DomainSpec::default()
            }),
            ..Domain::default()
        };
        let text = domain(&domain_with_all, SystemTime::UNIX_EPOCH);
        for line in [
            "disk          web1-0: 10 GiB in ssd, from debian13",
            "disk          web1-1: 5 GiB in the node's first pool, made blank, read-only, \
             500 requests/s, 100 MiB/s",
            "interface     52:54:00:00:00:01 in lan on br0: 10.0.0.5/24, gateway 10.0.0.1, \
             name servers 10.0.0.53",
            "interface     52:54:00:00:00:02 on the node's bridge",
            "seed          host name www, 1 SSH key, 31 B of user data",
            "kernel        the first disk's",
        ] {
            assert!(text.lines().any(|l| l == line), "no \"{line}\" in\n{text}");
        }
        assert!(!text.contains("secret"), "{text}");
    }
}
