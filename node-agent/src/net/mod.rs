//! The domains' network: one persistent tap per interface, a port of a bridge.
//!
//! A tap is named after its domain's uid ([`tap_name`]) and carries the whole uid as its alias,
//! so that an operator sees whose it is and two domains never share one. The agent makes it, the
//! VMM opens it by name, and the agent removes it when the domain is gone.

mod ioctl;

use std::fs;
use std::io;
use std::path::PathBuf;

use drover_proto::v1::NetworkInterface;

use crate::error::Error;

/// A tap of ours begins with this.
const TAP_PREFIX: &str = "dv";
/// So many characters of the uid are in the name: `dvXXXXXXXX-N` fits Linux' 15.
const UID_CHARS: usize = 8;

/// The name of the tap of a domain's interface `index`.
pub fn tap_name(uid: &str, index: usize) -> String {
    let short: String = uid.chars().filter(|c| *c != '-').take(UID_CHARS).collect();
    format!("{TAP_PREFIX}{short}-{index}")
}

/// The part of the uid that is in the name of a tap of ours; `None` for any other interface.
fn uid_part(name: &str) -> Option<&str> {
    let (uid, index) = name.strip_prefix(TAP_PREFIX)?.split_once('-')?;
    let ours = uid.len() == UID_CHARS
        && uid.bytes().all(|b| b.is_ascii_hexdigit())
        && !index.is_empty()
        && index.bytes().all(|b| b.is_ascii_digit());
    ours.then_some(uid)
}

/// Makes sure that the bridge is there and up; an existing one is left as it is, with its ports
/// and addresses.
pub fn ensure_bridge(name: &str) -> Result<(), Error> {
    if !exists(name) {
        ioctl::add_bridge(name).map_err(fail("make the bridge", name))?;
        // No address of the host on the guests' network, unless the operator gives it one.
        disable_ipv6(name);
        tracing::info!(bridge = name, "made the bridge; give it an uplink to reach other nodes");
    } else if !is_bridge(name) {
        return Err(Error::Flag {
            flag: "--bridge",
            reason: format!("{name} is an interface, but no bridge; give the name of a bridge"),
        });
    }
    ioctl::set_up(name).map_err(fail("bring up", name))
}

/// Makes a domain's taps and adds them to their bridges; those that are right already are left
/// alone. `node` is for the messages. Returns their names, in order.
pub fn ensure_taps(
    uid: &str,
    interfaces: &[NetworkInterface],
    default_bridge: &str,
    node: &str,
) -> Result<Vec<String>, Error> {
    let mut names = Vec::with_capacity(interfaces.len());
    for (index, interface) in interfaces.iter().enumerate() {
        let bridge = match interface.bridge.as_str() {
            "" => default_bridge,
            other => other,
        };
        if !is_bridge(bridge) {
            return Err(Error::Domain(format!(
                "interfaces[{index}].bridge: {bridge}: no such bridge on node {node}"
            )));
        }
        let name = tap_name(uid, index);
        ensure_tap(&name, uid, bridge, &interface.mac)?;
        names.push(name);
    }
    Ok(names)
}

fn ensure_tap(name: &str, uid: &str, bridge: &str, guest_mac: &str) -> Result<(), Error> {
    let fresh = !exists(name);
    if fresh {
        ioctl::add_tap(name).map_err(fail("make the tap", name))?;
    }
    let result = configure_tap(name, uid, bridge, guest_mac, fresh);
    if result.is_err() && fresh {
        // Nothing half done: the error that led here is the one to tell.
        let _ = ioctl::remove_tap(name);
    }
    result
}

fn configure_tap(
    name: &str,
    uid: &str,
    bridge: &str,
    guest_mac: &str,
    fresh: bool,
) -> Result<(), Error> {
    if fresh {
        fs::write(attribute(name, "ifalias"), uid).map_err(fail("set the alias", name))?;
        disable_ipv6(name);
        // A bridge takes the lowest address of its ports for its own, and would lose its
        // neighbours each time that a domain comes or goes: this one is never the lowest.
        if let Some(mac) = port_mac(guest_mac) {
            ioctl::set_mac(name, mac).map_err(fail("set the address", name))?;
        }
    } else {
        let owner = fs::read_to_string(attribute(name, "ifalias")).unwrap_or_default();
        if owner.trim() != uid {
            return Err(Error::Domain(format!(
                "interface {name}: exists already and belongs to {:?}, not to domain {uid}",
                owner.trim()
            )));
        }
    }
    let mtu = ioctl::mtu(bridge).map_err(fail("read the MTU", bridge))?;
    ioctl::set_mtu(name, mtu).map_err(fail("set the MTU", name))?;
    match bridge_of(name) {
        Some(current) if current == bridge => {}
        Some(current) => {
            ioctl::leave_bridge(&current, name).map_err(fail("leave its bridge", name))?;
            ioctl::join_bridge(bridge, name).map_err(fail("join the bridge", name))?;
        }
        None => ioctl::join_bridge(bridge, name).map_err(fail("join the bridge", name))?,
    }
    ioctl::set_up(name).map_err(fail("bring up", name))
}

/// Removes all taps of a domain. They must not be open.
pub fn remove_taps(uid: &str) -> Result<(), Error> {
    for name in ioctl::interfaces().map_err(fail("list interfaces", "network"))? {
        if uid_part(&name).is_some() && name.starts_with(&tap_name(uid, 0)[..UID_CHARS + 3]) {
            let owner = fs::read_to_string(attribute(&name, "ifalias")).unwrap_or_default();
            // One without an alias was left by a crash right after it was made.
            if owner.trim().is_empty() || owner.trim() == uid {
                ioctl::remove_tap(&name).map_err(fail("remove the tap", &name))?;
            }
        }
    }
    Ok(())
}

/// Removes the taps of ours that belong to none of the domains `uids`; returns their names.
pub fn remove_leftover_taps(uids: &[String]) -> Result<Vec<String>, Error> {
    let known: Vec<String> = uids.iter().map(|uid| tap_name(uid, 0)).collect();
    let mut removed = Vec::new();
    for name in ioctl::interfaces().map_err(fail("list interfaces", "network"))? {
        let Some(part) = uid_part(&name) else { continue };
        let belongs = known.iter().any(|tap| uid_part(tap) == Some(part));
        if !belongs && attribute(&name, "tun_flags").exists() {
            // Somebody may hold it open; that is no reason for the node to be without an agent.
            match ioctl::remove_tap(&name) {
                Ok(()) => removed.push(name),
                Err(error) => {
                    tracing::warn!(tap = name, %error, "cannot remove a tap that belongs to no domain");
                }
            }
        }
    }
    Ok(removed)
}

fn fail(action: &'static str, name: &str) -> impl FnOnce(io::Error) -> Error {
    let name = name.to_owned();
    move |source| Error::Net { action, name, source }
}

fn attribute(name: &str, attribute: &str) -> PathBuf {
    PathBuf::from("/sys/class/net").join(name).join(attribute)
}

fn exists(name: &str) -> bool {
    attribute(name, "ifindex").exists()
}

fn is_bridge(name: &str) -> bool {
    !name.contains('/') && attribute(name, "bridge").is_dir()
}

fn bridge_of(name: &str) -> Option<String> {
    let link = fs::read_link(attribute(name, "brport/bridge")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

/// A tap and a bridge of guests speak no IPv6 of their own. A host without IPv6 has no such file.
fn disable_ipv6(name: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    if let Err(err) = fs::write(&path, "1")
        && err.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(interface = name, %err, "cannot switch IPv6 off");
    }
}

/// The guest's address with a first byte that makes it locally administered, and high.
fn port_mac(guest_mac: &str) -> Option<[u8; 6]> {
    let mut mac = guest_mac.parse::<drover_hv::config::MacAddress>().ok()?.bytes();
    mac[0] = 0xfe;
    Some(mac)
}

#[cfg(test)]
mod tests;
