//! Names without a kernel; taps and bridges with the real one, in a network namespace of the
//! test's own thread.

use super::*;
use std::process::Command;

const UID: &str = "4d8e0f0e-6c6f-4d3b-8f1e-0c6f7a9b2d11";
const SAME_PREFIX: &str = "4d8e0f0e-0000-4d3b-8f1e-0c6f7a9b2d22";

#[test]
fn tap_names_fit_and_are_known_again() {
    let name = tap_name(UID, 3);
    assert_eq!(name, "dv4d8e0f0e-3");
    assert!(name.len() <= 15);
    assert_eq!(uid_part(&name), Some("4d8e0f0e"));
    for other in
        ["eth0", "br0", "dv", "dv-0", "dv4d8e0f0e", "dv4d8e0f0e-", "dv4d8e0f0-0", "dvzzzzzzzz-0"]
    {
        assert_eq!(uid_part(other), None, "{other}");
    }
}

#[test]
fn a_port_never_gives_the_bridge_its_address() {
    assert_eq!(port_mac("52:54:00:12:34:56"), Some([0xfe, 0x54, 0, 0x12, 0x34, 0x56]));
    assert_eq!(port_mac("nonsense"), None);
}

/// Puts this thread into network and mount namespaces of its own with its own /sys. Needs root
/// and /dev/net/tun: without them the test says so and ends.
fn own_network() -> bool {
    // SAFETY: geteuid has no preconditions.
    let root = unsafe { libc::geteuid() } == 0;
    if !root || !std::path::Path::new("/dev/net/tun").exists() {
        eprintln!("not tried: needs root and /dev/net/tun");
        return false;
    }
    // SAFETY: unshare changes the calling thread only, which is this test's own.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS | libc::CLONE_FS) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    for arguments in [["--make-rprivate", "/"].as_slice(), &["-t", "sysfs", "sysfs", "/sys"]] {
        assert!(Command::new("mount").args(arguments).status().unwrap().success());
    }
    true
}

fn interface(bridge: &str) -> NetworkInterface {
    NetworkInterface {
        mac: "52:54:00:12:34:56".into(),
        bridge: bridge.into(),
        ..NetworkInterface::default()
    }
}

fn read(name: &str, what: &str) -> String {
    fs::read_to_string(attribute(name, what)).unwrap().trim().to_owned()
}

/// The life of a domain's taps: made, ports of the bridge with its MTU, found again after the
/// agent's restart while a VMM has one open, not shared with another domain, removed.
#[test]
fn taps_live_and_end_with_their_domain() {
    std::thread::spawn(|| {
        if !own_network() {
            return;
        }
        ensure_bridge("br0").unwrap();
        ensure_bridge("br0").unwrap();
        ioctl::set_mtu("br0", 1400).unwrap();
        let two = [interface(""), interface("br0")];
        let names = ensure_taps(UID, &two, "br0", "host1").unwrap();
        assert_eq!(names, ["dv4d8e0f0e-0", "dv4d8e0f0e-1"]);
        for name in &names {
            assert_eq!(bridge_of(name).as_deref(), Some("br0"));
            assert_eq!(read(name, "mtu"), "1400");
            assert_eq!(read(name, "ifalias"), UID);
            assert_eq!(read(name, "address"), "fe:54:00:12:34:56");
        }

        // As the VMM opens it: by name, with the same flags.
        let tun = OpenTap::open(&names[0]);
        assert_eq!(ensure_taps(UID, &two, "br0", "host1").unwrap(), names);
        assert!(remove_taps(UID).is_err(), "a tap that is open is not removed");
        drop(tun);

        let err = ensure_taps(SAME_PREFIX, &two[..1], "br0", "host1").unwrap_err().to_string();
        assert!(err.contains(UID), "{err}");
        remove_taps(SAME_PREFIX).unwrap();
        assert!(exists(&names[0]), "another domain's taps are left alone");

        let err = ensure_taps(UID, &[interface("br7")], "br0", "host1").unwrap_err().to_string();
        assert_eq!(err, "interfaces[0].bridge: br7: no such bridge on node host1");

        assert!(remove_leftover_taps(&[UID.to_owned()]).unwrap().is_empty());
        // The second went, the first (open at that time) is still there or both are: all go, when
        // the last child that another test was just forking has become another program.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while let Err(err) = remove_taps(UID) {
            assert!(std::time::Instant::now() < deadline, "{err}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(!exists(&names[0]) && !exists(&names[1]));
        remove_taps(UID).unwrap();

        ensure_taps(UID, &two[..1], "br0", "host1").unwrap();
        assert_eq!(remove_leftover_taps(&[]).unwrap(), ["dv4d8e0f0e-0"]);
        assert!(exists("br0") && exists("lo"));

        let err = ensure_bridge("lo").unwrap_err().to_string();
        assert!(err.starts_with("--bridge: lo"), "{err}");
    })
    .join()
    .unwrap();
}

/// A tap held open, as a VMM does.
struct OpenTap(#[expect(dead_code, reason = "held open")] std::fs::File);

impl OpenTap {
    fn open(name: &str) -> Self {
        use std::os::fd::AsRawFd;
        let tun = fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: all zero is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes the ifreq behind the pointer.
        let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        Self(tun)
    }
}
