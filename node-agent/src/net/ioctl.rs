//! The few ioctls that make taps and bridges: less than a netlink library, and enough.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketType, socket};

// <linux/sockios.h>
const SIOCBRADDBR: libc::c_ulong = 0x89a0;
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
const SIOCBRDELIF: libc::c_ulong = 0x89a3;

/// The flags with which the VMM opens a tap as well: frames without a prefix, each with a
/// virtio-net header.
const TAP_FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// A new persistent tap.
pub(super) fn add_tap(name: &str) -> io::Result<()> {
    persist_tap(name, true)
}

/// Removes a tap that nobody has open; one that is not there is no error.
pub(super) fn remove_tap(name: &str) -> io::Result<()> {
    if index(name).is_err() {
        return Ok(());
    }
    persist_tap(name, false)
}

fn persist_tap(name: &str, persist: bool) -> io::Result<()> {
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = TAP_FLAGS as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes the ifreq behind the pointer, which lives on this stack.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    // SAFETY: TUNSETPERSIST takes its argument as a number, not as a pointer.
    check(unsafe {
        libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, libc::c_ulong::from(persist))
    })
}

/// A new bridge. One that has been made meanwhile is no error.
pub(super) fn add_bridge(name: &str) -> io::Result<()> {
    let socket = control()?;
    // The name is checked as any interface's.
    let _ = request(name)?;
    let name = CString::new(name)?;
    // SAFETY: SIOCBRADDBR reads a string of at most IFNAMSIZ bytes, which `name` is.
    let result = check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCBRADDBR, name.as_ptr()) });
    match result {
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Makes `name` a port of `bridge`.
pub(super) fn join_bridge(bridge: &str, name: &str) -> io::Result<()> {
    change_port(SIOCBRADDIF, bridge, name)
}

/// Makes `name` no port of `bridge`.
pub(super) fn leave_bridge(bridge: &str, name: &str) -> io::Result<()> {
    change_port(SIOCBRDELIF, bridge, name)
}

fn change_port(code: libc::c_ulong, bridge: &str, name: &str) -> io::Result<()> {
    let mut request = request(bridge)?;
    request.ifr_ifru.ifru_ifindex = index(name)?;
    call(code, &mut request)
}

/// Sets IFF_UP.
pub(super) fn set_up(name: &str) -> io::Result<()> {
    let mut request = request(name)?;
    call(libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS has just filled this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    call(libc::SIOCSIFFLAGS, &mut request)
}

/// The MTU in bytes.
pub(super) fn mtu(name: &str) -> io::Result<i32> {
    let mut request = request(name)?;
    call(libc::SIOCGIFMTU, &mut request)?;
    // SAFETY: SIOCGIFMTU has just filled this member of the union.
    Ok(unsafe { request.ifr_ifru.ifru_mtu })
}

/// Sets the MTU in bytes.
pub(super) fn set_mtu(name: &str, mtu: i32) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_mtu = mtu;
    call(libc::SIOCSIFMTU, &mut request)
}

/// Sets the Ethernet address.
pub(super) fn set_mac(name: &str, mac: [u8; 6]) -> io::Result<()> {
    let mut request = request(name)?;
    // SAFETY: all zero is a valid sockaddr.
    let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
    address.sa_family = libc::ARPHRD_ETHER;
    for (to, from) in address.sa_data.iter_mut().zip(mac) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_hwaddr = address;
    call(libc::SIOCSIFHWADDR, &mut request)
}

/// The names of all interfaces of this network namespace.
pub(super) fn interfaces() -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir("/sys/class/net")? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

fn index(name: &str) -> io::Result<libc::c_int> {
    let mut request = request(name)?;
    call(libc::SIOCGIFINDEX, &mut request)?;
    // SAFETY: SIOCGIFINDEX has just filled this member of the union.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex })
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() >= request.ifr_name.len() || bytes.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "an interface's name has 1 to 15 characters",
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(request)
}

fn call(code: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    let socket = control()?;
    // SAFETY: all codes used here read and write one ifreq, which `request` is.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), code, std::ptr::from_mut(request)) })
}

fn control() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::INET, SocketType::DGRAM, None)?)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
