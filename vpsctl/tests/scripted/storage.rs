//! Pools, volumes, images and networks as people and programs see them.

use drover_proto::v1::{Image, Network, Pool, PoolKind, PoolState, Volume, VolumeState};

use crate::{
    common::run,
    member::{Member, Script},
};

fn pool(node: &str, state: PoolState, reason: &str) -> Pool {
    let mut pool = Pool {
        name: format!("nodes/{node}/pools/ssd"),
        state_reason: reason.to_owned(),
        size_bytes: 1 << 40,
        used_bytes: 256 << 30,
        promised_bytes: 1 << 40,
        overcommit: 1.5,
        volume_count: 4,
        ..Pool::default()
    };
    pool.set_kind(PoolKind::Lvm);
    pool.set_state(state);
    pool
}

fn volume(name: &str, state: VolumeState) -> Volume {
    let mut volume = Volume {
        name: format!("volumes/{name}"),
        domain: "domains/web1".to_owned(),
        node: "nodes/host1".to_owned(),
        pool: "ssd".to_owned(),
        size_bytes: 10 << 30,
        allocated_bytes: 3 << 29,
        image: "images/debian13".to_owned(),
        ..Volume::default()
    };
    volume.set_state(state);
    volume
}

fn image(name: &str) -> Image {
    Image {
        name: format!("images/{name}"),
        digest: "0123456789abcdef".repeat(4),
        size_bytes: 3 << 30,
        nodes: vec!["nodes/host1".to_owned()],
        ..Image::default()
    }
}

fn network(name: &str, used: u32) -> Network {
    Network {
        name: format!("networks/{name}"),
        subnet: "10.0.0.0/24".to_owned(),
        gateway: "10.0.0.1".to_owned(),
        name_servers: vec!["10.0.0.53".to_owned(), "10.0.0.54".to_owned()],
        addresses_used: used,
        addresses_total: 253,
        ..Network::default()
    }
}

fn member() -> Member {
    let filling = "85% of its data is used";
    Member::start(Script {
        pools: vec![
            pool("host1", PoolState::Ready, ""),
            pool("host2", PoolState::Filling, filling),
        ],
        volumes: vec![
            volume("web1-0", VolumeState::Ready),
            volume("web1-1", VolumeState::Creating),
        ],
        images: vec![image("debian12"), image("debian13")],
        networks: vec![network("dmz", 0), network("lan", 2)],
        ..Script::default()
    })
}

/// A pool that fills is seen in the table and explained below it.
#[test]
fn pools_are_listed_and_trouble_stands_out() {
    let member = member();
    let table = run(member.address(), &["pool", "list", "--node=host2"]);
    assert_eq!(table.code, 0, "{table:#?}");
    let lines: Vec<_> = table.stdout.lines().collect();
    assert!(lines[0].starts_with("NODE    POOL   KIND   STATE"), "{table:#?}");
    assert!(lines[1].contains("ready") && lines[1].contains("256 GiB, 25%"), "{table:#?}");
    assert!(lines[1].contains("1 TiB of 1.5 TiB"), "{table:#?}");
    assert!(lines[2].contains("FILLING"), "{table:#?}");
    assert_eq!(lines[4], "host2: pool ssd is FILLING: 85% of its data is used");
    assert_eq!(member.asked().names, ["nodes/host2"]);
    let json = run(member.address(), &["pool", "list", "-o", "json"]).json();
    assert_eq!((&json[1]["state"], &json[1]["kind"]), (&"filling".into(), &"lvm".into()));
    assert_eq!(json[0]["overcommit"], 1.5);
}

#[test]
fn volumes_are_listed_and_shown() {
    let member = member();
    let table = run(member.address(), &["volume", "list", "--domain", "web1"]);
    assert_eq!((table.code, table.stdout.lines().count()), (0, 3), "both pages: {table:#?}");
    let row = "web1-1   creating   web1     host1   ssd    10 GiB   1.5 GiB   debian13";
    assert!(table.stdout.contains(row), "{table:#?}");
    assert_eq!(member.asked().names, ["domains/web1"; 2]);
    let page = run(member.address(), &["volume", "show", "web1-0"]);
    assert!(page.stdout.contains("size          10 GiB, takes 1.5 GiB in the pool"), "{page:#?}");
    let json = run(member.address(), &["volume", "show", "web1-0", "-o=json"]).json();
    assert_eq!(json["allocated_bytes"], 3_u64 << 29);
    run(member.address(), &["volume", "show", "none"])
        .says(3, "error: there is no volumes/none\nhint: vpsctl volume list shows");
}

#[test]
fn images_are_listed_shown_and_deleted() {
    let member = member();
    let table = run(member.address(), &["image", "list"]);
    let row = "debian13   3 GiB   0123456789ab   host1   -";
    assert_eq!(table.stdout.lines().last(), Some(row), "{table:#?}");
    let page = run(member.address(), &["image", "show", "images/debian13"]);
    assert!(page.stdout.contains(&"0123456789abcdef".repeat(4)), "{page:#?}");
    let gone = run(member.address(), &["image", "delete", "debian13"]);
    let said = "debian13 is deleted; volumes made of it stay\n";
    assert_eq!((gone.code, gone.stdout.as_str()), (0, said));
    let gone = run(member.address(), &["image", "delete", "debian13", "-o=json"]);
    assert_eq!(gone.json(), serde_json::json!({"name": "images/debian13"}));
    assert_eq!(member.asked().names, ["images/debian13"; 2]);
    for verb in ["show", "delete"] {
        run(member.address(), &["image", verb, "none"])
            .says(3, "error: there is no images/none\nhint: vpsctl image list shows");
    }
}

#[test]
fn networks_are_created_as_typed() {
    let member = member();
    let line = ["network", "create", "lan", "--subnet=10.0.0.0/24"];
    let created = run(member.address(), &line);
    let said = "lan is created: 253 addresses to give away\n";
    assert_eq!((created.code, created.stdout.as_str()), (0, said), "{created:#?}");
    let more = ["--gateway=10.0.0.1", "--dns=10.0.0.53", "--dns=10.0.0.54", "--first=10.0.0.100"];
    let rest = ["--last=10.0.0.199", "--bridge=br1", "-o=json"];
    let created = run(member.address(), &[&line[..], &more, &rest].concat());
    assert_eq!(created.json()["addresses_total"], 253);
    let asked = member.asked().networks;
    let plain = Network {
        name: "networks/lan".to_owned(),
        subnet: "10.0.0.0/24".to_owned(),
        ..Network::default()
    };
    assert_eq!(asked[0], plain);
    let full = Network {
        gateway: "10.0.0.1".to_owned(),
        name_servers: vec!["10.0.0.53".to_owned(), "10.0.0.54".to_owned()],
        first_address: "10.0.0.100".to_owned(),
        last_address: "10.0.0.199".to_owned(),
        bridge: "br1".to_owned(),
        ..plain
    };
    assert_eq!(asked[1], full);
    for (flag, expected) in [
        ("--subnet=10.0.0.0", "an IPv4 subnet is expected, such as 10.0.0.0/24"),
        ("--gateway=fd00::1", "an IPv4 address is expected"),
        ("--dns=here", "an IP address is expected"),
        ("--first=10.0.0.256", "an IPv4 address is expected"),
    ] {
        let kept = line.iter().filter(|a| !(a.starts_with("--subnet") && flag.contains("subnet")));
        let args: Vec<_> = kept.copied().chain([flag]).collect();
        run(member.address(), &args).says(2, expected);
    }
    run(member.address(), &line[..3]).says(2, "--subnet <SUBNET>");
    assert_eq!(member.asked().networks.len(), 2, "nothing more was asked");
}

#[test]
fn networks_are_listed_shown_and_deleted() {
    let member = member();
    let table = run(member.address(), &["network", "list"]);
    let row = "lan    10.0.0.0/24   10.0.0.1   10.0.0.53 10.0.0.54   -        2 / 253     -";
    assert_eq!(table.stdout.lines().last(), Some(row), "{table:#?}");
    let page = run(member.address(), &["network", "show", "lan"]);
    assert!(page.stdout.contains("addresses     2 of 253 taken\n"), "{page:#?}");
    assert!(page.stdout.contains("bridge        the node's own\n"), "{page:#?}");
    let gone = run(member.address(), &["network", "delete", "dmz"]);
    assert_eq!((gone.code, gone.stdout.as_str()), (0, "dmz is deleted\n"));
    run(member.address(), &["network", "delete", "lan"]).says(4, "networks/lan is used by");
    run(member.address(), &["network", "show", "none"]).says(3, "hint: vpsctl network list");
}
