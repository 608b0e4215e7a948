//! Frames that tell switches and neighbours where a guest is now.
//!
//! A switch learns from any frame's source address; hosts with the address in their caches learn
//! from gratuitous ARP (RFC 5227) and unsolicited neighbour advertisements (RFC 4861, 7.2.6).
//! RARP is what switches have been sent by hypervisors for twenty years, for guests whose
//! addresses are not known. Everything here is pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// When the rounds are sent, after the guest has begun to run.
pub const SCHEDULE: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(350),
    Duration::from_millis(750),
];

const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ARP_REQUEST: u16 = 1;
const RARP_REQUEST: u16 = 3;
/// All nodes on the link.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ICMPV6: u8 = 58;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Advertisement flags: override what is in the cache.
const NA_OVERRIDE: u32 = 0x2000_0000;
const OPTION_TARGET_LINK_ADDRESS: u8 = 2;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The frames of one round: one RARP, and one for each address.
pub fn frames(mac: MacAddress, addresses: &[IpAddr]) -> Vec<Vec<u8>> {
    let mut frames = vec![rarp(mac)];
    frames.extend(addresses.iter().map(|address| match address {
        IpAddr::V4(address) => gratuitous_arp(mac, *address),
        IpAddr::V6(address) => neighbour_advertisement(mac, *address),
    }));
    frames
}

fn ethernet(destination: [u8; 6], source: MacAddress, ethertype: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(90);
    frame.extend_from_slice(&destination);
    frame.extend_from_slice(&source.0);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame
}

fn arp_body(frame: &mut Vec<u8>, operation: u16, mac: MacAddress, ip: Ipv4Addr, target: [u8; 6]) {
    // Ethernet (1), IPv4 (0x0800), addresses of 6 and 4 bytes.
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame.extend_from_slice(&operation.to_be_bytes());
    frame.extend_from_slice(&mac.0);
    frame.extend_from_slice(&ip.octets());
    frame.extend_from_slice(&target);
    frame.extend_from_slice(&ip.octets());
    // The shortest Ethernet frame, without its checksum.
    frame.resize(60, 0);
}

/// "Who am I?", which every switch passes on.
fn rarp(mac: MacAddress) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, mac, ETHERTYPE_RARP);
    arp_body(&mut frame, RARP_REQUEST, mac, Ipv4Addr::UNSPECIFIED, mac.0);
    frame
}

/// An ARP announcement: a request for one's own address.
fn gratuitous_arp(mac: MacAddress, ip: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, mac, ETHERTYPE_ARP);
    arp_body(&mut frame, ARP_REQUEST, mac, ip, [0; 6]);
    frame
}

fn neighbour_advertisement(mac: MacAddress, ip: Ipv6Addr) -> Vec<u8> {
    let mut icmp = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0];
    icmp.extend_from_slice(&NA_OVERRIDE.to_be_bytes());
    icmp.extend_from_slice(&ip.octets());
    icmp.extend_from_slice(&[OPTION_TARGET_LINK_ADDRESS, 1]);
    icmp.extend_from_slice(&mac.0);
    let checksum = icmpv6_checksum(ip, ALL_NODES, &icmp);
    icmp[2..4].copy_from_slice(&checksum.to_be_bytes());

    // The multicast address's last four bytes, behind 33:33.
    let mut frame = ethernet([0x33, 0x33, 0, 0, 0, 1], mac, ETHERTYPE_IPV6);
    frame.extend_from_slice(&[0x60, 0, 0, 0]);
    frame.extend_from_slice(&(icmp.len() as u16).to_be_bytes());
    // Neighbour discovery is only believed with a hop limit of 255.
    frame.extend_from_slice(&[ICMPV6, 255]);
    frame.extend_from_slice(&ip.octets());
    frame.extend_from_slice(&ALL_NODES.octets());
    frame.extend_from_slice(&icmp);
    frame
}

/// RFC 4443, 2.3: over a pseudo-header and the message, whose checksum field is zero.
fn icmpv6_checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let mut bytes = Vec::with_capacity(40 + message.len());
    bytes.extend_from_slice(&source.octets());
    bytes.extend_from_slice(&destination.octets());
    bytes.extend_from_slice(&(message.len() as u32).to_be_bytes());
    bytes.extend_from_slice(&[0, 0, 0, ICMPV6]);
    bytes.extend_from_slice(message);
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn arp_frames_are_as_the_rfcs_draw_them() {
        let frames = frames(MAC, &["10.78.0.11".parse().unwrap()]);
        let padding = "0".repeat(36);
        assert_eq!(
            hex(&frames[0]),
            format!(
                "ffffffffffff5254001234568035{}{}{}{padding}",
                "0001080006040003", "52540012345600000000", "52540012345600000000"
            )
        );
        assert_eq!(
            hex(&frames[1]),
            format!(
                "ffffffffffff5254001234560806{}{}{}{padding}",
                "0001080006040001", "5254001234560a4e000b", "0000000000000a4e000b"
            )
        );
    }

    #[test]
    fn a_neighbour_advertisement_carries_a_right_checksum() {
        let address: Ipv6Addr = "fe80::5054:ff:fe12:3456".parse().unwrap();
        let frames = frames(MAC, &[address.into()]);
        let frame = &frames[1];
        assert_eq!(
            &frame[..14],
            [0x33, 0x33, 0, 0, 0, 1, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 0x86, 0xdd]
        );
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!(frame[21], 255);
        let icmp = &frame[54..];
        assert_eq!((icmp[0], icmp[4], icmp[24], icmp[25]), (136, 0x20, 2, 1));
        // Over the message with its checksum in place, the sum is all ones.
        assert_eq!(icmpv6_checksum(address, ALL_NODES, icmp), 0);
    }
}
