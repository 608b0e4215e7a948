//! What people type: sizes, durations, names, addresses. Every refusal says what would be accepted.

mod settings;

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    time::Duration,
};

use tonic::transport::Uri;

pub(crate) use self::settings::{
    disk, disk_limits, disk_size, interface, interface_in, label, limits,
};

const SIZE_UNITS: [(&str, u64); 5] =
    [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];
const PORT_DEFAULT: u16 = 7400;

/// Bytes, from `512MiB`, `1.5GiB` or a plain number of bytes.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let refuse = || "use a number with KiB, MiB, GiB or TiB, such as 512MiB".to_owned();
    let (number, unit) = split_unit(text);
    let unit = if unit.is_empty() { "B" } else { unit };
    let (_, factor) =
        SIZE_UNITS.iter().find(|(u, _)| u.eq_ignore_ascii_case(unit)).ok_or_else(refuse)?;
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(*factor).ok_or_else(|| "too large: at most 16 EiB".to_owned());
    }
    let parts: f64 = number.parse().map_err(|_| refuse())?;
    let bytes = parts * *factor as f64;
    if bytes.fract() != 0.0 || !bytes.is_finite() || bytes >= u64::MAX as f64 {
        return Err("is no whole number of bytes".to_owned());
    }
    Ok(bytes as u64)
}

/// Longer ones are a slip of the hand, and do not fit the clock.
const DURATION_MAX: Duration = Duration::from_secs(366 * 86_400);

/// A duration, from `100ms`, `30s`, `10m`, `1h` or a sum such as `1h30m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let refuse = || "use a number with ms, s, m or h, such as 100ms, 30s or 1h30m".to_owned();
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(refuse());
    }
    while !rest.is_empty() {
        let (number, after) = split_unit(rest);
        let unit = &after[..after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len())];
        let seconds_each = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            _ => return Err(refuse()),
        };
        let number: f64 = number.parse().map_err(|_| refuse())?;
        let part = Duration::try_from_secs_f64(number * seconds_each).map_err(|_| refuse())?;
        total = total.checked_add(part).ok_or_else(refuse)?;
        rest = &after[unit.len()..];
    }
    if total > DURATION_MAX {
        return Err("at most 8784h (a year) is accepted".to_owned());
    }
    Ok(total)
}

/// `12.5MiB` is `12.5` and `MiB`.
fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

/// `nodes/{id}`, from `{id}` or `nodes/{id}`.
pub(crate) fn node(text: &str) -> Result<String, String> {
    resource("nodes", "host1", text)
}

/// `domains/{id}`, from `{id}` or `domains/{id}`.
pub(crate) fn domain(text: &str) -> Result<String, String> {
    resource("domains", "web1", text)
}

/// `operations/{uuid}`, from the UUID or the whole name.
pub(crate) fn operation(text: &str) -> Result<String, String> {
    let name = resource("operations", "UUID", text)?;
    let id = &name["operations/".len()..];
    uuid::Uuid::parse_str(id)
        .map(|uuid| format!("operations/{uuid}"))
        .map_err(|_| "is no operation: a UUID is expected (vpsctl operation list)".to_owned())
}

/// `images/{id}`, from `{id}` or `images/{id}`.
pub(crate) fn image(text: &str) -> Result<String, String> {
    resource("images", "debian13", text)
}

/// `volumes/{id}`, from `{id}` or `volumes/{id}`.
pub(crate) fn volume(text: &str) -> Result<String, String> {
    resource("volumes", "web1-0", text)
}

/// `snapshots/{id}`, from `{id}` or `snapshots/{id}`.
pub(crate) fn snapshot(text: &str) -> Result<String, String> {
    resource("snapshots", "before-upgrade", text)
}

/// `networks/{id}`, from `{id}` or `networks/{id}`.
pub(crate) fn network(text: &str) -> Result<String, String> {
    resource("networks", "lan", text)
}

/// A pool's id, which is the same on every node that has one of its kind.
pub(crate) fn pool(text: &str) -> Result<String, String> {
    match text {
        "" => Err("is empty: a pool's id is expected, such as ssd".to_owned()),
        _ if text.contains('/') => {
            Err("has a slash where none belongs: a pool's id is expected, such as ssd".to_owned())
        }
        _ => Ok(text.to_owned()),
    }
}

const COLLECTIONS: [&str; 7] =
    ["nodes", "domains", "operations", "images", "volumes", "snapshots", "networks"];

/// The id's own form is checked by the controller, the only place that knows it.
fn resource(collection: &str, example: &str, text: &str) -> Result<String, String> {
    let expected = format!("{example} or {collection}/{example} is expected");
    match text.split_once('/') {
        _ if text.is_empty() => Err(format!("is empty: {expected}")),
        None => Ok(format!("{collection}/{text}")),
        Some((c, id)) if c == collection && !id.is_empty() => Ok(text.to_owned()),
        Some((c, _)) if c != collection && COLLECTIONS.contains(&c) => {
            Err(format!("is one of {c}: {expected}"))
        }
        Some(_) => Err(format!("has a slash where none belongs: {expected}")),
    }
}

/// What an event or an operation is about, as the API accepts it.
pub(crate) fn subject(text: &str) -> Result<String, String> {
    match text.split_once('/') {
        None if text == "cluster" => Ok(text.to_owned()),
        Some(("nodes" | "domains" | "volumes" | "operations", id)) if !id.is_empty() => {
            Ok(text.to_owned())
        }
        _ => Err("domains/NAME, nodes/NAME, volumes/NAME, operations/UUID or cluster is expected"
            .to_owned()),
    }
}

/// `host:port` of a controller; the port is 7400 when left out.
pub(crate) fn server(text: &str) -> Result<String, String> {
    let expected = "HOST:PORT is expected, such as 10.77.0.11:7400";
    let text = text.trim();
    if text.is_empty() {
        return Err(format!("an address is empty: {expected}"));
    }
    if text.contains("//") {
        return Err(format!("\"{text}\" is a URL: {expected}"));
    }
    let bare = text.rsplit_once(':').is_none() || text.ends_with(']');
    let address = if bare { format!("{text}:{PORT_DEFAULT}") } else { text.to_owned() };
    let uri: Result<Uri, _> = format!("http://{address}").parse();
    match uri {
        Ok(uri) if uri.port_u16().is_some() && uri.path() == "/" => Ok(address),
        _ => Err(format!("\"{text}\" is no address: {expected}")),
    }
}

/// `http://…` or `https://…`, which a node fetches.
pub(crate) fn url(text: &str) -> Result<String, String> {
    let host = |uri: &Uri| uri.host().is_some_and(|host| !host.is_empty());
    match text.parse::<Uri>() {
        Ok(uri) if matches!(uri.scheme_str(), Some("http" | "https")) && host(&uri) => {
            Ok(text.to_owned())
        }
        _ => Err("http:// or https:// with a host is expected, such as \
                  https://images.example/debian13.qcow2"
            .to_owned()),
    }
}

/// A SHA-256 in hexadecimal, in lower case.
pub(crate) fn sha256(text: &str) -> Result<String, String> {
    const DIGITS: usize = 64;
    if text.len() == DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(text.to_ascii_lowercase());
    }
    Err(format!("{DIGITS} hexadecimal digits are expected, as sha256sum prints them"))
}

/// A backup's name: a file of it is called so.
pub(crate) fn backup(text: &str) -> Result<String, String> {
    const LENGTH_MAX: usize = 100;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let begins = text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if begins && text.len() <= LENGTH_MAX && text.chars().all(plain) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "1 to {LENGTH_MAX} of a-z, A-Z, 0-9, '-', '_' and '.' are expected, beginning with a letter \
         or digit"
    ))
}

/// A directory's path.
pub(crate) fn directory(text: &str) -> Result<PathBuf, String> {
    match text {
        "" => Err("is empty: a directory's path is expected".to_owned()),
        path => Ok(path.into()),
    }
}

/// A user inside a guest; what it may be called there is the guest's to say.
pub(crate) fn user(text: &str) -> Result<String, String> {
    const LENGTH_MAX: usize = 32;
    let odd = |c: char| c.is_control() || c.is_whitespace() || c == ':';
    if text.is_empty() || text.chars().count() > LENGTH_MAX || text.chars().any(odd) {
        return Err(format!(
            "a user's name is expected, 1 to {LENGTH_MAX} characters without blanks and ':'"
        ));
    }
    Ok(text.to_owned())
}

/// A file with an end: its length is said before its bytes.
pub(crate) fn image_file(text: &str) -> Result<PathBuf, String> {
    match text {
        "" => Err("is empty: a file's path is expected".to_owned()),
        "-" => Err("stands for the standard input, whose length nobody knows: a file's path is \
                    expected"
            .to_owned()),
        path => Ok(path.into()),
    }
}

/// An IPv4 address.
pub(crate) fn ipv4(text: &str) -> Result<String, String> {
    let expected = |_| "an IPv4 address is expected, such as 10.0.0.1".to_owned();
    text.parse().map(|address: Ipv4Addr| address.to_string()).map_err(expected)
}

/// An address of either version.
pub(crate) fn address(text: &str) -> Result<String, String> {
    let expected = |_| "an IP address is expected, such as 10.0.0.1".to_owned();
    text.parse().map(|address: IpAddr| address.to_string()).map_err(expected)
}

/// `10.0.0.0/24`; which prefixes are of use, and that nothing lies behind them, is the
/// controller's to check.
pub(crate) fn subnet(text: &str) -> Result<String, String> {
    let parts = text.split_once('/').and_then(|(address, prefix)| {
        Some((address.parse::<Ipv4Addr>().ok()?, prefix.parse::<u8>().ok()?))
    });
    match parts {
        Some((address, prefix)) if u32::from(prefix) <= u32::BITS => {
            Ok(format!("{address}/{prefix}"))
        }
        _ => Err("an IPv4 subnet is expected, such as 10.0.0.0/24".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("1048576"), Ok(1 << 20));
        assert_eq!(size("512MiB"), Ok(512 << 20));
        assert_eq!(size("512 mib"), Ok(512 << 20));
        assert_eq!(size("1.5GiB"), Ok(3 << 29));
        assert_eq!(size("0"), Ok(0), "the controller says what is too little");
        for bad in ["", "MiB", "512M", "512MB", "-1GiB", "1e3MiB", "1.2.3GiB", "nanMiB", "0.3B"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert_eq!(size("99999999TiB").unwrap_err(), "too large: at most 16 EiB");
        assert_eq!(
            size("512M").unwrap_err(),
            "use a number with KiB, MiB, GiB or TiB, such as 512MiB"
        );
    }

    #[test]
    fn durations() {
        assert_eq!(duration("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("2min"), Ok(Duration::from_secs(120)));
        for bad in ["", "10", "10x", "s", "1h30", "-5s", "10sm", "99999999999999999999h", "8785h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names() {
        assert_eq!(node("host1"), Ok("nodes/host1".to_owned()));
        assert_eq!(domain("domains/web1"), Ok("domains/web1".to_owned()));
        assert!(domain("nodes/host1").unwrap_err().starts_with("is one of nodes: web1 or"));
        assert!(domain("a/b").unwrap_err().starts_with("has a slash"));
        assert!(node("").is_err());
        assert!(node("nodes/").is_err());
        let uuid = "6f1c7b0e-8f3c-4c59-9d5e-0d6a3f0c1f1a";
        assert_eq!(operation(uuid), Ok(format!("operations/{uuid}")));
        assert_eq!(operation(&format!("operations/{uuid}")), Ok(format!("operations/{uuid}")));
        assert!(operation("web1").unwrap_err().contains("a UUID is expected"));
        assert!(operation("domains/web1").unwrap_err().starts_with("is one of domains"));
        assert_eq!(subject("nodes/host1"), Ok("nodes/host1".to_owned()));
        assert_eq!(subject("cluster"), Ok("cluster".to_owned()));
        assert_eq!(subject("volumes/a"), Ok("volumes/a".to_owned()));
        assert!(subject("volumes/").is_err());
        assert!(subject("web1").is_err());
    }

    #[test]
    fn servers() {
        assert_eq!(server("10.77.0.11"), Ok("10.77.0.11:7400".to_owned()));
        assert_eq!(server("ctl:99"), Ok("ctl:99".to_owned()));
        assert_eq!(server("[::1]"), Ok("[::1]:7400".to_owned()));
        assert_eq!(server("[::1]:7"), Ok("[::1]:7".to_owned()));
        for bad in ["", "http://a:1", "a:x", "a:99999", "a b:1", "a:1/x"] {
            assert!(server(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_of_storage_and_networks() {
        assert_eq!(image("debian13"), Ok("images/debian13".to_owned()));
        assert_eq!(volume("volumes/web1-0"), Ok("volumes/web1-0".to_owned()));
        assert_eq!(network("lan"), Ok("networks/lan".to_owned()));
        assert!(image("networks/lan").unwrap_err().starts_with("is one of networks: debian13 or"));
        assert_eq!(pool("ssd"), Ok("ssd".to_owned()));
        assert!(pool("nodes/host1/pools/ssd").unwrap_err().contains("a pool's id is expected"));
        assert!(pool("").is_err());
    }

    #[test]
    fn what_an_import_is_given() {
        let digest = "E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855";
        assert_eq!(sha256(digest), Ok(digest.to_lowercase()));
        for bad in ["", &digest[1..], &digest.replace('E', "G"), &format!("{digest}00")] {
            assert!(sha256(bad).unwrap_err().contains("64 hexadecimal digits"), "{bad}");
        }
        assert_eq!(url("https://a.example/x?y=1"), Ok("https://a.example/x?y=1".to_owned()));
        for bad in ["", "/x", "a.example/x", "ftp://a/x", "file:///x", "http://", "http:///x"] {
            assert!(url(bad).unwrap_err().starts_with("http:// or https://"), "{bad}");
        }
        assert_eq!(image_file("./x"), Ok("./x".into()));
        assert!(image_file("-").unwrap_err().contains("standard input"));
        assert!(image_file("").is_err());
    }

    #[test]
    fn what_backups_and_passwords_are_given() {
        assert_eq!(snapshot("a"), Ok("snapshots/a".to_owned()));
        assert!(snapshot("volumes/a").unwrap_err().starts_with("is one of volumes"));
        assert_eq!(backup("web1-20261123-011600"), Ok("web1-20261123-011600".to_owned()));
        for bad in ["", ".", "..", ".x", "a/b", "-a", "a b", "é", &"a".repeat(101)] {
            assert!(backup(bad).unwrap_err().starts_with("1 to 100 of a-z"), "{bad}");
        }
        assert!(directory("").is_err());
        assert_eq!(user("www-data"), Ok("www-data".to_owned()));
        for bad in ["", "a b", "a:b", "a\n", &"a".repeat(33)] {
            assert!(user(bad).unwrap_err().starts_with("a user's name is expected"), "{bad}");
        }
    }

    #[test]
    fn addresses() {
        assert_eq!(subnet("10.0.0.0/24"), Ok("10.0.0.0/24".to_owned()));
        for bad in
            ["10.0.0.0", "10.0.0.0/33", "10.0.0/24", "10.0.0.0/", "fd00::/64", "10.0.0.0/+8 "]
        {
            assert!(subnet(bad).is_err(), "{bad}");
        }
        assert_eq!(ipv4("10.0.0.1"), Ok("10.0.0.1".to_owned()));
        assert!(ipv4("fd00::1").is_err() && ipv4("10.0.0.1/24").is_err() && ipv4("").is_err());
        assert_eq!(address("fd00::1"), Ok("fd00::1".to_owned()));
        assert!(address("dns").unwrap_err().contains("an IP address is expected"));
    }
}
