//! `domain create` with disks, networks and a seed: what the API is asked, and what is refused
//! before it is asked.

use drover_proto::v1::{
    Boot, CloudInit, Disk, DiskLimits, Domain, DomainSpec, NetworkInterface, OperationKind,
    OperationState,
};

use crate::{
    common::run,
    member::{Member, Script},
    operation, running_domain,
};

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKZP me@desk";
const LINE: [&str; 4] = ["domain", "create", "web1", "--memory=1GiB"];

fn member() -> Member {
    let accepted = operation(OperationKind::CreateDomain, OperationState::Succeeded, "");
    Member::start(Script { accepted, domain: running_domain(), ..Script::default() })
}

/// The spec that the member was asked for with these flags.
fn asked(flags: &[&str]) -> DomainSpec {
    let member = member();
    let ended = run(member.address(), &[&LINE[..], flags].concat());
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "web1 is running on -\n"), "{ended:#?}");
    member.asked().domains.remove(0).domain.unwrap().spec.unwrap()
}

/// Everything at once, in the order typed.
#[test]
fn a_vps_with_disks_networks_and_a_seed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("key.pub"), format!("{KEY}\n")).unwrap();
    std::fs::write(path("user"), "#cloud-config\n").unwrap();
    let (key, user_data) = (path("key.pub"), path("user"));
    let spec = asked(&[
        "--disk=image=debian13,size=10GiB,pool=ssd",
        "--network=lan",
        "--disk",
        "size=5GiB,read-only,iops=500,bps=1MiB",
        "--net=bridge=br1",
        "--ssh-key",
        &key,
        "--user-data",
        &user_data,
        "--host-name=www",
    ]);
    let root = Disk {
        image: "images/debian13".to_owned(),
        size_bytes: 10 << 30,
        pool: "ssd".to_owned(),
        ..Disk::default()
    };
    let limits =
        DiskLimits { requests_per_second: 500, bytes_per_second: 1 << 20, ..DiskLimits::default() };
    let data =
        Disk { size_bytes: 5 << 30, read_only: true, limits: Some(limits), ..Disk::default() };
    assert_eq!(spec.disks, [root, data]);
    let lan = NetworkInterface { network: "networks/lan".to_owned(), ..Default::default() };
    let bridged = NetworkInterface { bridge: "br1".to_owned(), ..Default::default() };
    assert_eq!(spec.interfaces, [lan, bridged]);
    let seed = CloudInit {
        host_name: "www".to_owned(),
        ssh_authorized_keys: vec![KEY.to_owned()],
        user_data: "#cloud-config\n".to_owned(),
    };
    assert_eq!(spec.cloud_init, Some(seed));
    assert_eq!(spec.boot, Some(Boot::default()), "the disk's own kernel and command line");
}

/// The seed is there when it is asked for, and only then; a kernel is still as it was.
#[test]
fn a_seed_is_asked_for_and_a_kernel_is_as_before() {
    assert_eq!(asked(&["--disk=image=a"]).cloud_init, None);
    assert_eq!(asked(&["--disk=image=a", "--cloud-init"]).cloud_init, Some(CloudInit::default()));
    let named = asked(&["--disk=image=a", "--host-name=www"]).cloud_init.unwrap();
    assert_eq!((named.host_name.as_str(), named.ssh_authorized_keys.len()), ("www", 0));
    let spec = asked(&["--kernel=/k", "--initramfs=/i", "--net=address=10.0.0.5"]);
    let boot = Boot {
        kernel: "/k".to_owned(),
        initramfs: "/i".to_owned(),
        command_line: "console=ttyS0".to_owned(),
    };
    assert_eq!((spec.boot, spec.interfaces.len(), spec.disks.len()), (Some(boot), 1, 0));
    let line = asked(&["--disk=image=a", "--command-line=quiet"]).boot.unwrap().command_line;
    assert_eq!(line, "quiet");
    let blank = asked(&["--kernel=/k", "--disk=size=1GiB"]);
    assert_eq!(blank.disks.len(), 1, "a kernel may have a blank disk");
}

/// One clear error with exit code 2 each, and nothing is asked.
#[test]
fn what_cannot_be_is_refused_before_anything_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("id"), "-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n").unwrap();
    std::fs::write(path("large"), vec![b'a'; (64 << 10) + 1]).unwrap();
    let (private, large, none) = (path("id"), path("large"), path("none"));
    let boots = "--disk=image=a";
    for (flags, expected) in [
        (&[][..], "<--disk <SETTINGS>|--kernel <PATH>>"),
        (&["--disk=size=5GiB"], "error: --disk: the first one is blank"),
        (&["--disk=image=a,size=10G"], "size: use a number with KiB, MiB"),
        (&["--disk=image=a,cache=none"], "\"cache=none\" is not known: image=, size="),
        (&[boots, "--initramfs=/i"], "--kernel <PATH>"),
        (&[boots, "--network=nodes/a"], "is one of nodes: lan or networks/lan is expected"),
        (&[boots, "--net=network="], "network: is empty"),
        (&[boots, "--host-name="], "--host-name <NAME>"),
        (&[boots, "--ssh-key", &private], "holds a private key: its public part is expected"),
        (&[boots, "--ssh-key", &none], "error: --ssh-key: \""),
        (&[boots, "--user-data", &large], "is too large: at most 64 KiB are accepted"),
    ] {
        let ended = run("127.0.0.1:1", &[&LINE[..], flags].concat());
        ended.says(2, expected);
        assert!(!ended.stderr.contains("c2VjcmV0"), "{ended:#?}");
    }
}

/// `domain show` of such a domain: where each disk lies and which addresses it has.
#[test]
fn a_domain_shows_disks_and_addresses() {
    let disk = Disk {
        volume: "volumes/web1-0".to_owned(),
        pool: "ssd".to_owned(),
        size_bytes: 10 << 30,
        image: "images/debian13".to_owned(),
        ..Disk::default()
    };
    let interface = NetworkInterface {
        mac: "52:54:00:00:00:01".to_owned(),
        network: "networks/lan".to_owned(),
        bridge: "br0".to_owned(),
        addresses: vec!["10.0.0.5".to_owned()],
        prefix_length: 24,
        ..NetworkInterface::default()
    };
    let spec =
        DomainSpec { disks: vec![disk], interfaces: vec![interface], ..DomainSpec::default() };
    let domain = Domain { spec: Some(spec), ..running_domain() };
    let member = Member::start(Script { domain, ..Script::default() });
    let page = run(member.address(), &["domain", "show", "web1"]);
    for line in [
        "disk          web1-0: 10 GiB in ssd, from debian13",
        "interface     52:54:00:00:00:01 in lan on br0: 10.0.0.5/24",
    ] {
        assert!(page.stdout.lines().any(|l| l == line), "no \"{line}\": {page:#?}");
    }
    let json = run(member.address(), &["domain", "show", "web1", "-o=json"]).json();
    assert_eq!(json["spec"]["disks"][0]["volume"], "volumes/web1-0");
    assert_eq!(json["spec"]["interfaces"][0]["network"], "networks/lan");
}
