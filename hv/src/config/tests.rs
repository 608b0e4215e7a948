//! What is accepted, and the JSON.

use super::*;

fn good() -> DomainConfig {
    DomainConfig {
        uid: "4d8e0f0e-6c6f-4d3b-8f1e-0c6f7a9b2d11".into(),
        name: "domains/web-1".into(),
        epoch: 1,
        vcpus: 1,
        memory_bytes: 128 << 20,
        kernel: Some("/boot/vmlinuz".into()),
        initramfs: Some("/boot/initramfs.img".into()),
        boot_disk: None,
        command_line: "console=ttyS0".into(),
        interfaces: vec![InterfaceConfig {
            mac: "52:54:00:12:34:56".into(),
            tap: "tap0".into(),
            addresses: vec!["10.78.0.11".into(), "fd00::11".into()],
        }],
        disks: vec![DiskConfig {
            path: "/srv/web-1/root.raw".into(),
            read_only: false,
            serial: "web-1-root".into(),
            limits: DiskLimits { iops: 500, iops_burst: 2000, ..DiskLimits::default() },
            slot: None,
            shared: false,
            zeroed: false,
        }],
        guest_agent: true,
        generation_id: Some("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87".into()),
        restore: Some("/srv/web-1/memory.raw".into()),
        on_reboot: OnReboot::Restart,
    }
}

fn root_disk(path: &str) -> BootDiskConfig {
    BootDiskConfig { path: path.into(), own_root: false }
}

/// Each bad value is refused with the name of its field; nothing else is complained about.
#[test]
fn errors_name_the_field() {
    good().validate().unwrap();
    type Change = fn(&mut DomainConfig);
    let cases: &[(&str, Change)] = &[
        ("uid", |c| c.uid = "../x".into()),
        ("name", |c| c.name = "web".into()),
        ("name", |c| c.name = "domains/a/b".into()),
        ("name", |c| c.name = "domains/-a".into()),
        ("name", |c| c.name = format!("domains/{}", "a".repeat(64))),
        ("epoch", |c| c.epoch = 0),
        ("vcpus", |c| c.vcpus = 0),
        ("vcpus", |c| c.vcpus = 9),
        ("memory_bytes", |c| c.memory_bytes = 31 << 20),
        ("memory_bytes", |c| c.memory_bytes = (64 << 20) + 4096),
        ("memory_bytes", |c| c.memory_bytes = 1 << 40),
        ("kernel", |c| c.kernel = Some("vmlinuz".into())),
        ("kernel", |c| c.kernel = None),
        ("boot_disk", |c| c.boot_disk = Some(root_disk("/dev/vg/root"))),
        ("initramfs", |c| {
            c.kernel = None;
            c.boot_disk = Some(root_disk("/dev/vg/root"));
        }),
        ("boot_disk.path", |c| {
            (c.kernel, c.initramfs) = (None, None);
            c.boot_disk = Some(root_disk("root.img"));
        }),
        ("boot_disk.own_root", |c| {
            (c.kernel, c.initramfs) = (None, None);
            c.boot_disk = Some(BootDiskConfig { own_root: true, ..root_disk("/other") });
        }),
        ("restore", |c| c.restore = Some("memory.raw".into())),
        ("initramfs", |c| c.initramfs = Some("".into())),
        ("command_line", |c| c.command_line = "x".repeat(2048)),
        ("command_line", |c| c.command_line = "a\nb".into()),
        ("interfaces", |c| c.interfaces = vec![c.interfaces[0].clone(); 5]),
        ("interfaces[0].mac", |c| c.interfaces[0].mac = "01:00:00:00:00:00".into()),
        ("interfaces[0].mac", |c| c.interfaces[0].mac = "52:54:00:12:34".into()),
        ("interfaces[0].mac", |c| c.interfaces[0].mac = "52:54:00:12:34:+6".into()),
        ("interfaces[0].tap", |c| c.interfaces[0].tap = "a/b".into()),
        ("interfaces[0].tap", |c| c.interfaces[0].tap = "x".repeat(16)),
        ("interfaces[0].addresses[1]", |c| c.interfaces[0].addresses[1] = "10/8".into()),
        ("interfaces[1].tap", |c| {
            c.interfaces.push(InterfaceConfig {
                mac: "52:54:00:12:34:57".into(),
                ..c.interfaces[0].clone()
            });
        }),
        ("generation_id", |c| c.generation_id = Some(String::new())),
        ("generation_id", |c| c.generation_id = Some("{324e6eafd1d14bf6bf41b9bb6c91fb87}".into())),
        ("generation_id", |c| c.generation_id = Some(Uuid::nil().to_string())),
        ("disks", |c| c.disks = vec![c.disks[0].clone(); 9]),
        ("disks[0].path", |c| c.disks[0].path = "root.raw".into()),
        ("disks[0].serial", |c| c.disks[0].serial = "x".repeat(21)),
        ("disks[0].serial", |c| c.disks[0].serial = "a b".into()),
        ("disks[0].limits.iops_burst", |c| c.disks[0].limits.iops = 0),
        ("disks[0].limits.iops", |c| c.disks[0].limits.iops = 1 << 40),
        ("disks[0].limits.bytes_per_second", |c| c.disks[0].limits.bytes_per_second = 512),
        ("disks[0].limits.bytes_burst", |c| {
            c.disks[0].limits.bytes_per_second = 1 << 20;
            c.disks[0].limits.bytes_burst = 1 << 60;
        }),
        ("disks[1].path", |c| {
            c.disks.push(DiskConfig { serial: String::new(), ..c.disks[0].clone() });
        }),
        ("disks[1].serial", |c| {
            c.disks.push(DiskConfig { path: "/srv/other".into(), ..c.disks[0].clone() });
        }),
    ];
    for (field, change) in cases {
        let mut config = good();
        change(&mut config);
        let error = config.validate().unwrap_err();
        assert_eq!(&error.field, field, "{error}");
    }
}

/// The JSON is what the agent writes: optional parts may be missing, unknown ones are refused.
#[test]
fn json_round_trip_and_unknown_fields() {
    let text = serde_json::to_string(&good()).unwrap();
    assert_eq!(serde_json::from_str::<DomainConfig>(&text).unwrap(), good());
    let minimal = r#"{"uid":"u","name":"domains/a","epoch":1,"vcpus":1,
        "memory_bytes":134217728,"kernel":"/k"}"#;
    let config: DomainConfig = serde_json::from_str(minimal).unwrap();
    assert_eq!(config.on_reboot, OnReboot::Restart);
    let from_disk = minimal.replace(r#""kernel":"/k""#, r#""boot_disk":{"path":"/d"}"#);
    let config: DomainConfig = serde_json::from_str(&from_disk).unwrap();
    config.validate().unwrap();
    assert_eq!(config.boot_disk, Some(root_disk("/d")));
    // A VMM from before there were disks reads what needs none.
    let text = serde_json::to_string(&config).unwrap();
    assert!(!text.contains("disks") && !text.contains("guest_agent"));
    assert!(!text.contains("generation") && !text.contains("own_root"));
    assert!(!text.contains("restore"));
    let disk = minimal.replace("\"epoch\"", "\"disks\":[{\"path\":\"/d\"}],\"epoch\"");
    let config: DomainConfig = serde_json::from_str(&disk).unwrap();
    assert_eq!((config.disks[0].read_only, config.disks[0].serial.as_str()), (false, ""));
    assert_eq!(config.disks[0].limits, DiskLimits::default());
    assert!(!serde_json::to_string(&config).unwrap().contains("limits"));
    let unknown = minimal.replace("\"epoch\"", "\"cpu\":1,\"epoch\"");
    let error = serde_json::from_str::<DomainConfig>(&unknown).unwrap_err();
    assert!(error.to_string().contains("cpu"), "{error}");
}

/// A rescue disk before the domain's own is `vda`; behind them it would be another one.
#[test]
fn the_disk_of_the_root_has_the_guests_name() {
    let disks = r#"{"uid":"u","name":"domains/a","epoch":1,"vcpus":1,"memory_bytes":134217728,
        "boot_disk":{"path":"/b","own_root":true},"disks":[{"path":"/a"},{"path":"/b"}]}"#;
    let mut config: DomainConfig = serde_json::from_str(disks).unwrap();
    config.validate().unwrap();
    assert_eq!(config.own_root().as_deref(), Some("vdb"));
    config.disks.swap(0, 1);
    assert_eq!(config.own_root().as_deref(), Some("vda"));
    config.boot_disk = Some(root_disk("/b"));
    assert_eq!(config.own_root(), None);
}

#[test]
fn mac_addresses_print_as_they_were_read() {
    let mac: MacAddress = "52:54:00:Ab:cd:0f".parse().unwrap();
    assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
    assert_eq!(mac.bytes(), [0x52, 0x54, 0, 0xab, 0xcd, 0x0f]);
}
