use std::io::Read as _;

use super::*;

fn seed() -> Seed {
    Seed {
        instance_id: "b0000000-0000-4000-8000-000000000001".into(),
        host_name: "web1.example.org".into(),
        ssh_keys: vec!["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ ann@example.org".into()],
        user_data: "#!/bin/sh\necho \"hello\"\n".into(),
        interfaces: vec![
            Interface {
                mac: mac("52:54:00:12:34:56"),
                addressing: Addressing::Static {
                    addresses: vec![prefix("192.0.2.7", 32), prefix("2001:db8::7", 64)],
                    gateways: vec![ip("192.0.2.1"), ip("2001:db8::1")],
                    name_servers: vec![ip("192.0.2.53")],
                },
            },
            Interface { mac: mac("52:54:00:12:34:57"), addressing: Addressing::Dhcp },
        ],
    }
}

fn mac(text: &str) -> MacAddress {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn prefix(address: &str, bits: u8) -> Prefix {
    Prefix { address: ip(address), bits }
}

/// A file of the disk, read as any FAT driver would.
fn file(disk: &[u8], name: &str) -> String {
    let mut cursor = Cursor::new(disk.to_vec());
    let filesystem = fatfs::FileSystem::new(&mut cursor, fatfs::FsOptions::new()).unwrap();
    let mut text = String::new();
    filesystem.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
    text
}

fn json_file(disk: &[u8], name: &str) -> Value {
    serde_json::from_str(&file(disk, name)).unwrap()
}

/// The field that is refused.
fn refused(change: impl FnOnce(&mut Seed)) -> String {
    let mut seed = seed();
    change(&mut seed);
    seed.disk().unwrap_err().field
}

/// What cloud-init looks for is there: the label (in both places that have one), the three files
/// under their long names, and in them what was asked for.
#[test]
fn the_disk_says_what_was_asked_for() {
    let disk = seed().disk().unwrap();
    assert_eq!(disk.len(), DISK_BYTES);
    {
        let mut cursor = Cursor::new(disk.clone());
        let filesystem = fatfs::FileSystem::new(&mut cursor, fatfs::FsOptions::new()).unwrap();
        assert_eq!(filesystem.volume_label(), "CIDATA");
        let label = filesystem.read_volume_label_from_root_dir().unwrap();
        assert_eq!(label.as_deref(), Some("CIDATA"));
        let names: Vec<String> =
            filesystem.root_dir().iter().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["meta-data", "user-data", "network-config"]);
    }
    let expected = json!({
        "instance-id": "b0000000-0000-4000-8000-000000000001",
        "local-hostname": "web1.example.org",
        "public-keys": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ ann@example.org"],
    });
    assert_eq!(json_file(&disk, "meta-data"), expected);
    assert_eq!(file(&disk, "user-data"), "#!/bin/sh\necho \"hello\"\n");
    let expected = json!({ "version": 2, "ethernets": {
        "net0": {
            "match": { "macaddress": "52:54:00:12:34:56" },
            "dhcp4": false,
            "addresses": ["192.0.2.7/32", "2001:db8::7/64"],
            "routes": [
                { "to": "0.0.0.0/0", "via": "192.0.2.1", "on-link": true },
                { "to": "::/0", "via": "2001:db8::1", "on-link": true },
            ],
            "nameservers": { "addresses": ["192.0.2.53"] },
        },
        "net1": { "match": { "macaddress": "52:54:00:12:34:57" }, "dhcp4": true },
    } });
    assert_eq!(json_file(&disk, "network-config"), expected);
}

/// Two nodes must make the same disk, as a domain may move between a start and the next; and
/// another seed must make another.
#[test]
fn the_same_seed_makes_the_same_bytes() {
    let disk = seed().disk().unwrap();
    assert_eq!(disk, seed().disk().unwrap());
    let other = Seed { host_name: "web2.example.org".into(), ..seed() };
    assert_ne!(disk, other.disk().unwrap());
}

/// Without user data the file is there all the same: without it cloud-init takes the disk for none.
#[test]
fn no_user_data_is_an_empty_configuration() {
    let disk = Seed { user_data: String::new(), ..seed() }.disk().unwrap();
    assert_eq!(file(&disk, "user-data"), "#cloud-config\n{}\n");
}

/// All bounds at once still fit.
#[test]
fn the_largest_seed_fits() {
    let addressing = Addressing::Static {
        addresses: vec![prefix("2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", 128); ADDRESSES_MAX],
        gateways: vec![ip("2001:db8:ffff:ffff:ffff:ffff:ffff:fffe")],
        name_servers: vec![ip("2001:db8:ffff:ffff:ffff:ffff:ffff:fffd"); NAME_SERVERS_MAX],
    };
    let key = format!("ssh-rsa AAAA{}", "x".repeat(SSH_KEY_BYTES_MAX - 12));
    let seed = Seed {
        instance_id: "i".repeat(INSTANCE_ID_BYTES_MAX),
        host_name: format!("{}.a", "h".repeat(HOST_NAME_BYTES_MAX - 2)),
        ssh_keys: vec![key.clone(); SSH_KEYS_MAX],
        user_data: "u".repeat(USER_DATA_BYTES_MAX),
        interfaces: (0..INTERFACES_MAX)
            .map(|n| Interface {
                mac: mac(&format!("52:54:00:00:00:{n:02x}")),
                addressing: addressing.clone(),
            })
            .collect(),
    };
    let disk = seed.disk().unwrap();
    assert_eq!(file(&disk, "user-data").len(), USER_DATA_BYTES_MAX);
    assert_eq!(json_file(&disk, "meta-data")["public-keys"][SSH_KEYS_MAX - 1], json!(key));
}

/// A comment with YAML's own signs in it stays a comment, and user data is not looked into.
#[test]
fn hostile_text_says_no_more_than_itself() {
    let key = "ssh-ed25519 AAAAC3 \"], \"instance-id\": \"x\" # : {{ }} & * ! \\ ' é";
    let user_data = "\0---\ninstance-id: x\n\u{feff}";
    let seed = Seed { ssh_keys: vec![key.into()], user_data: user_data.into(), ..seed() };
    let disk = seed.disk().unwrap();
    let meta_data = json_file(&disk, "meta-data");
    assert_eq!(meta_data["public-keys"], json!([key]));
    assert_eq!(meta_data["instance-id"], json!(seed.instance_id));
    assert_eq!(file(&disk, "user-data"), user_data);
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    for id in ["", "a b", "a\nb", "ä", &"i".repeat(INSTANCE_ID_BYTES_MAX + 1)] {
        assert_eq!(refused(|s| s.instance_id = id.into()), "instance_id", "{id:?}");
    }
    let long = format!("{}.example", "h".repeat(LABEL_BYTES_MAX + 1));
    for name in ["", ".", "a..b", "-a", "a-", "a_b", "a\nb", "a\"b", "a.", &long] {
        assert_eq!(refused(|s| s.host_name = name.into()), "host_name", "{name:?}");
    }
    let long = format!("ssh-rsa AAAA{}", "x".repeat(SSH_KEY_BYTES_MAX));
    for key in [
        "",
        "ssh-rsa",
        "ssh-rsa hello",
        "command=\"sh\" ssh-rsa AAAA",
        "ssh-rsa AAAA a\nssh-rsa AAAA",
        "ssh-rsa AAAA \u{7f}",
        "ssh-rsa AAAA \u{85}",
        "ssh-rsa AAAA\0",
        "ssh-rsa AAAA \u{ffff}",
        " ssh-rsa AAAA",
        &long,
    ] {
        assert_eq!(refused(|s| s.ssh_keys.push(key.into())), "ssh_keys[1]", "{key:?}");
    }
    let many = vec!["ssh-rsa AAAA".to_owned(); SSH_KEYS_MAX + 1];
    assert_eq!(refused(|s| s.ssh_keys = many), "ssh_keys");
    let large = "u".repeat(USER_DATA_BYTES_MAX + 1);
    assert_eq!(refused(|s| s.user_data = large), "user_data");
    assert_eq!(refused(|s| s.interfaces[1].mac = s.interfaces[0].mac), "interfaces[1].mac");
    let many = vec![seed().interfaces[0].clone(); INTERFACES_MAX + 1];
    assert_eq!(refused(|s| s.interfaces = many), "interfaces");
}

#[test]
fn addresses_that_make_no_sense_are_refused_by_name() {
    let with = |addresses: &[Prefix], gateways: &[&str], name_servers: usize| {
        let addressing = Addressing::Static {
            addresses: addresses.to_vec(),
            gateways: gateways.iter().map(|text| ip(text)).collect(),
            name_servers: vec![ip("::1"); name_servers],
        };
        refused(|s| s.interfaces[1].addressing = addressing)
    };
    let (four, six) = (prefix("192.0.2.7", 24), prefix("2001:db8::7", 64));
    assert_eq!(with(&[], &[], 0), "interfaces[1].addresses");
    assert_eq!(with(&[four; ADDRESSES_MAX + 1], &[], 0), "interfaces[1].addresses");
    assert_eq!(with(&[four, prefix("192.0.2.8", 33)], &[], 0), "interfaces[1].addresses[1]");
    assert_eq!(with(&[prefix("::1", 129)], &[], 0), "interfaces[1].addresses[0]");
    assert_eq!(with(&[four], &["2001:db8::1"], 0), "interfaces[1].gateways[0]");
    assert_eq!(with(&[six], &["2001:db8::1", "2001:db8::2"], 0), "interfaces[1].gateways[1]");
    assert_eq!(with(&[six], &[], NAME_SERVERS_MAX + 1), "interfaces[1].name_servers");
}
