//! What is typed as settings joined by commas: interfaces and disks; and labels.

use drover_proto::v1::{Disk, DiskLimits, DiskResize, NetworkInterface};

use super::{image, network, pool, size};

/// `key=value`.
pub(crate) fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("KEY=VALUE is expected".to_owned()),
    }
}

/// One interface, from `default` or any of `network=…`, `mac=…`, `bridge=…`, `address=…` joined
/// by commas.
pub(crate) fn interface(text: &str) -> Result<NetworkInterface, String> {
    let mut interface = NetworkInterface::default();
    if text == "default" {
        return Ok(interface);
    }
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("network", value)) => {
                interface.network = network(value).map_err(|e| format!("network: {e}"))?;
            }
            Some(("mac", value)) if !value.is_empty() => interface.mac = value.to_owned(),
            Some(("bridge", value)) if !value.is_empty() => interface.bridge = value.to_owned(),
            Some(("address", value)) if !value.is_empty() => {
                interface.addresses.push(value.to_owned());
            }
            _ => {
                return Err(format!(
                    "\"{part}\" is not known: network=, mac=, bridge= and address= are, such as \
                     address=10.78.0.11,bridge=br0"
                ));
            }
        }
    }
    Ok(interface)
}

/// An interface in a network, which chooses the rest.
pub(crate) fn interface_in(text: &str) -> Result<NetworkInterface, String> {
    Ok(NetworkInterface { network: network(text)?, ..NetworkInterface::default() })
}

/// One disk, from `image=…`, `size=…`, `pool=…`, `read-only`, `iops=…` and `bps=…` joined by
/// commas, each at most once.
pub(crate) fn disk(text: &str) -> Result<Disk, String> {
    let mut disk = Disk::default();
    let mut limits = DiskLimits::default();
    let mut seen = Vec::new();
    for part in text.split(',') {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (part, None),
        };
        if seen.contains(&key) {
            return Err(format!("\"{key}\" is given twice: once is expected"));
        }
        seen.push(key);
        match (key, value) {
            ("image", Some(value)) => disk.image = of_key(key, image(value))?,
            ("pool", Some(value)) => disk.pool = of_key(key, pool(value))?,
            ("size", Some(value)) => disk.size_bytes = of_key(key, above_zero(size(value)))?,
            ("iops", Some(value)) => {
                limits.requests_per_second = of_key(key, above_zero(whole(value)))?;
            }
            ("bps", Some(value)) => limits.bytes_per_second = of_key(key, above_zero(size(value)))?,
            ("read-only", None) => disk.read_only = true,
            ("read-only", Some(_)) => return Err("read-only: takes no value".to_owned()),
            ("image" | "pool" | "size" | "iops" | "bps", None) => {
                return Err(format!("{key}: {key}=VALUE is expected"));
            }
            _ => {
                return Err(format!(
                    "\"{part}\" is not known: image=, size=, pool=, read-only, iops= and bps= \
                     are, such as image=debian13,size=10GiB,pool=ssd"
                ));
            }
        }
    }
    if disk.image.is_empty() && disk.size_bytes == 0 {
        return Err("size: is missing: a disk without image= is blank and needs one, such as \
                    size=5GiB"
            .to_owned());
    }
    disk.limits = (limits != DiskLimits::default()).then_some(limits);
    Ok(disk)
}

/// A disk's new size, from `N=SIZE`.
pub(crate) fn disk_size(text: &str) -> Result<DiskResize, String> {
    let (disk, value) = place(text, "0=20GiB")?;
    let size_bytes = above_zero(size(value))?;
    Ok(DiskResize { disk, size_bytes, limits: None })
}

/// A disk's new limits, from `N=none` or `N=iops=…,bps=…`; what is not given is no limit.
pub(crate) fn disk_limits(text: &str) -> Result<DiskResize, String> {
    const EXAMPLE: &str = "0=iops=500,bps=100MiB or 0=none";
    let (disk, value) = place(text, EXAMPLE)?;
    let limits = match value {
        "none" => DiskLimits::default(),
        value => some_limits(value, &format!("or none, such as {EXAMPLE}"))?,
    };
    Ok(DiskResize { disk, size_bytes: 0, limits: Some(limits) })
}

/// A new disk's limits: `iops=…,bps=…` with one or both.
pub(crate) fn limits(text: &str) -> Result<DiskLimits, String> {
    some_limits(text, "such as iops=500,bps=100MiB")
}

fn some_limits(text: &str, others: &str) -> Result<DiskLimits, String> {
    let mut limits = DiskLimits::default();
    for part in text.split(',') {
        let field = match part.split_once('=') {
            Some(("iops", n)) => (&mut limits.requests_per_second, of_key("iops", whole(n))),
            Some(("bps", n)) => (&mut limits.bytes_per_second, of_key("bps", size(n))),
            _ => return Err(format!("\"{part}\" is not known: iops= and bps= are, {others}")),
        };
        if *field.0 > 0 {
            return Err(format!("\"{part}\" is given twice: once is expected"));
        }
        *field.0 = above_zero(field.1)?;
    }
    Ok(limits)
}

/// `N=…`: a disk's place, from 0, and what follows.
fn place<'a>(text: &'a str, example: &str) -> Result<(u32, &'a str), String> {
    let parts = text.split_once('=').and_then(|(n, rest)| Some((n.parse().ok()?, rest)));
    parts.ok_or_else(|| format!("a disk's number from 0 and '=' are expected, such as {example}"))
}

fn of_key<T>(key: &str, value: Result<T, String>) -> Result<T, String> {
    value.map_err(|e| format!("{key}: {e}"))
}

fn whole(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "a whole number is expected, such as 500".to_owned())
}

/// Nothing would mean the default, or no limit: who wants that says nothing.
fn above_zero(number: Result<u64, String>) -> Result<u64, String> {
    match number? {
        0 => Err("more than 0 is expected".to_owned()),
        number => Ok(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces() {
        assert_eq!(interface("default"), Ok(NetworkInterface::default()));
        let full = interface("mac=52:54:00:00:00:01,bridge=br0,address=10.0.0.1,address=fd00::1");
        let full = full.unwrap();
        assert_eq!(full.mac, "52:54:00:00:00:01");
        assert_eq!(full.bridge, "br0");
        assert_eq!(full.addresses, ["10.0.0.1", "fd00::1"]);
        assert_eq!(interface("network=lan"), interface_in("networks/lan"));
        assert_eq!(interface_in("lan").unwrap().network, "networks/lan");
        assert!(interface("ip=10.0.0.1").unwrap_err().contains("\"ip=10.0.0.1\" is not known"));
        assert!(interface("mac=").is_err());
        assert!(interface("network=").unwrap_err().starts_with("network: is empty"));
        assert!(interface_in("nodes/host1").is_err());
        assert_eq!(label("tier=gold"), Ok(("tier".to_owned(), "gold".to_owned())));
        assert!(label("tier").is_err());
    }

    #[test]
    fn disks() {
        let full =
            disk("image=debian13,size=10GiB,pool=ssd,read-only,iops=500,bps=100MiB").unwrap();
        let limits = DiskLimits {
            requests_per_second: 500,
            bytes_per_second: 100 << 20,
            ..DiskLimits::default()
        };
        let expected = Disk {
            image: "images/debian13".to_owned(),
            size_bytes: 10 << 30,
            pool: "ssd".to_owned(),
            read_only: true,
            limits: Some(limits),
            ..Disk::default()
        };
        assert_eq!(full, expected);
        let blank = Disk { size_bytes: 5 << 30, ..Disk::default() };
        assert_eq!(disk("size=5GiB"), Ok(blank), "no limits are none, not zeros");
    }

    #[test]
    fn limits_of_a_new_disk() {
        let both = DiskLimits {
            requests_per_second: 500,
            bytes_per_second: 1 << 20,
            ..DiskLimits::default()
        };
        assert_eq!(limits("iops=500,bps=1MiB"), Ok(both));
        assert_eq!(
            limits("none").unwrap_err(),
            "\"none\" is not known: iops= and bps= are, such as iops=500,bps=100MiB"
        );
    }

    #[test]
    fn disks_that_change() {
        let grown = DiskResize { disk: 1, size_bytes: 20 << 30, limits: None };
        assert_eq!(disk_size("1=20GiB"), Ok(grown));
        let limits = DiskLimits { requests_per_second: 500, ..DiskLimits::default() };
        let limited = DiskResize { disk: 0, size_bytes: 0, limits: Some(limits) };
        assert_eq!(disk_limits("0=iops=500"), Ok(limited));
        let lifted = DiskResize { limits: Some(DiskLimits::default()), ..limited };
        assert_eq!(disk_limits("0=none"), Ok(lifted), "zeros, not nothing");
        assert_eq!(
            disk_limits("0=bps=1MiB,iops=5").unwrap().limits.unwrap().bytes_per_second,
            1 << 20
        );
        for (text, expected) in [
            ("20GiB", "a disk's number from 0 and '=' are expected, such as 0=20GiB"),
            ("a=20GiB", "a disk's number"),
            ("-1=20GiB", "a disk's number"),
            ("0=20G", "use a number with KiB"),
            ("0=0", "more than 0 is expected"),
        ] {
            assert!(disk_size(text).unwrap_err().starts_with(expected), "{text}");
        }
        for (text, expected) in [
            ("none", "a disk's number"),
            ("0=", "\"\" is not known: iops= and bps= are, or none"),
            ("0=cache=1", "\"cache=1\" is not known"),
            ("0=iops=0", "more than 0 is expected"),
            ("0=iops=1,iops=2", "\"iops=2\" is given twice"),
            ("0=bps=x", "bps: use a number"),
        ] {
            assert!(disk_limits(text).unwrap_err().starts_with(expected), "{text}");
        }
    }

    /// Each key that is wrong is named, with what it takes.
    #[test]
    fn a_disk_that_is_refused_says_why() {
        for (text, expected) in [
            ("", "\"\" is not known: image=, size="),
            ("debian13", "\"debian13\" is not known"),
            ("image=a,", "\"\" is not known"),
            ("disk=a", "\"disk=a\" is not known"),
            ("image", "image: image=VALUE is expected"),
            ("image=", "image: is empty: debian13 or images/debian13 is expected"),
            ("image=volumes/a", "image: is one of volumes"),
            ("size=10G", "size: use a number with KiB, MiB"),
            ("size=0", "size: more than 0 is expected"),
            ("image=a,size=1GiB,size=2GiB", "\"size\" is given twice"),
            ("image=a,pool=", "pool: is empty"),
            ("image=a,pool=x/y", "pool: has a slash"),
            ("image=a,read-only=yes", "read-only: takes no value"),
            ("image=a,iops=many", "iops: a whole number is expected"),
            ("image=a,iops=0", "iops: more than 0 is expected"),
            ("image=a,bps=1e9", "bps: use a number with KiB, MiB"),
            ("pool=ssd", "size: is missing: a disk without image= is blank"),
            ("read-only", "size: is missing"),
        ] {
            let refused = disk(text).unwrap_err();
            assert!(refused.starts_with(expected), "\"{text}\": {refused}");
        }
    }
}
