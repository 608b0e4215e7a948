//! The command line. Each flag has an environment variable, for the unit's environment file.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::Parser;

use crate::error::Error;
use crate::storage::PoolFlag;

/// Default port of AgentService.
pub const PORT_DEFAULT: u16 = 7401;
/// Default port of a controller.
pub const CONTROLLER_PORT_DEFAULT: u16 = 7400;
const VCPU_OVERCOMMIT_MAX: u32 = 64;

/// The daemon on a node: makes what is there equal what the controller wants.
#[derive(Debug, Clone, Parser)]
#[command(name = "drover-agent", version, about, max_term_width = 100)]
pub struct Options {
    /// This node's id in the cluster: 1 to 63 of a-z, 0-9 and '-'
    #[arg(long, env = "DROVER_NODE", value_name = "ID", value_parser = parse_id)]
    pub node: String,
    /// The cluster that it belongs to, as its controllers were started with
    #[arg(long, env = "DROVER_CLUSTER_ID", value_name = "ID", value_parser = parse_cluster)]
    pub cluster_id: String,
    /// A controller's address; repeat it for each of them
    #[arg(
        long = "controller",
        env = "DROVER_CONTROLLERS",
        value_name = "ADDR:PORT",
        value_delimiter = ',',
        required = true,
        value_parser = parse_controller
    )]
    pub controllers: Vec<String>,
    /// Where AgentService listens, for the controllers
    #[arg(long, env = "DROVER_LISTEN", value_name = "ADDR:PORT",
          default_value_t = SocketAddr::from(([0, 0, 0, 0], PORT_DEFAULT)))]
    pub listen: SocketAddr,
    /// What the controllers are told to dial; made of --listen (or, when that names no address,
    /// of --migration-address and its port)
    #[arg(long, env = "DROVER_ADVERTISE", value_name = "ADDR:PORT", value_parser = parse_controller)]
    pub advertise: Option<String>,
    /// The address on which guests come in; the one of --listen when that names one
    #[arg(long, env = "DROVER_MIGRATION_ADDRESS", value_name = "ADDR")]
    pub migration_address: Option<IpAddr>,
    /// What must survive a reboot: the node's identity, the domains' records
    #[arg(long, env = "DROVER_STATE_DIR", value_name = "DIR", default_value = "/var/lib/drover")]
    pub state_dir: PathBuf,
    /// What need not: the VMMs' sockets
    #[arg(long, env = "DROVER_RUN_DIR", value_name = "DIR", default_value = "/run/drover")]
    pub run_dir: PathBuf,
    /// The drover-vmm binary
    #[arg(
        long,
        env = "DROVER_VMM",
        value_name = "FILE",
        default_value = "/usr/local/bin/drover-vmm"
    )]
    pub vmm: PathBuf,
    /// The bridge of domains' interfaces that name none; made if it is not there
    #[arg(long, env = "DROVER_BRIDGE", value_name = "NAME", default_value = "br0")]
    pub bridge: String,
    /// A pool for the domains' volumes: ID=lvm:VG/THINPOOL, ID=dir:/path, or ID=shared:/path on a
    /// filesystem that several nodes have mounted; ",overcommit=2.0" behind it when so many times
    /// its size may be promised; repeat it for each pool, or put a ';' between them in the
    /// variable
    #[arg(long = "pool", env = "DROVER_POOLS", value_name = "ID=POOL", value_delimiter = ';')]
    pub pools: Vec<PoolFlag>,
    /// vCPUs that are promised for each core
    #[arg(long, env = "DROVER_VCPU_OVERCOMMIT", value_name = "N", default_value_t = 4,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(VCPU_OVERCOMMIT_MAX)))]
    pub vcpu_overcommit: u32,
    /// Memory kept for the host, e.g. 512MiB or 4GiB [default: a tenth, at least 512MiB]
    #[arg(long, env = "DROVER_MEMORY_RESERVED", value_name = "SIZE", value_parser = parse_size)]
    pub memory_reserved: Option<u64>,
    /// Where traces go, http://HOST:PORT of an OTLP collector; OTEL_EXPORTER_OTLP_ENDPOINT also
    /// says so
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
}

/// The addresses that follow from the flags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    /// host:port of AgentService, for the controllers.
    pub advertise: String,
    /// `ADDR:0`, where a waiting VMM listens.
    pub migration_listen: String,
}

impl Options {
    /// Works the addresses out, and checks what one flag alone cannot show.
    pub fn addresses(&self) -> Result<Addresses, Error> {
        let listen_ip = self.listen.ip();
        let migration = match self.migration_address {
            Some(address) if address.is_unspecified() => {
                return Err(Error::Flag {
                    flag: "--migration-address",
                    reason: format!("{address}: give one address that other nodes can reach"),
                });
            }
            Some(address) => address,
            None if !listen_ip.is_unspecified() => listen_ip,
            None => {
                return Err(Error::Flag {
                    flag: "--migration-address",
                    reason: format!(
                        "is needed, because --listen {} names no address; give the one that \
                         other nodes can reach",
                        self.listen
                    ),
                });
            }
        };
        let reached = if listen_ip.is_unspecified() { migration } else { listen_ip };
        let advertise = match &self.advertise {
            Some(advertise) => advertise.clone(),
            None => SocketAddr::new(reached, self.listen.port()).to_string(),
        };
        Ok(Addresses { advertise, migration_listen: SocketAddr::new(migration, 0).to_string() })
    }

    /// Checks the flags that name things on this host.
    pub fn check(&self) -> Result<(), Error> {
        use std::os::unix::fs::PermissionsExt;
        let bad = |flag, reason: String| Err(Error::Flag { flag, reason });
        if self.listen.port() == 0 && self.advertise.is_none() {
            return bad("--listen", format!("{}: give a port", self.listen));
        }
        match std::fs::metadata(&self.vmm) {
            Err(err) => bad("--vmm", format!("{}: {err}", self.vmm.display())),
            Ok(meta) if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 => {
                bad("--vmm", format!("{}: is no program", self.vmm.display()))
            }
            Ok(_) => Ok(()),
        }?;
        for (flag, dir) in [("--state-dir", &self.state_dir), ("--run-dir", &self.run_dir)] {
            if !dir.is_absolute() {
                return bad(flag, format!("{}: give an absolute path", dir.display()));
            }
        }
        // A unix socket's path has at most 107 characters, and this is the longest part of it.
        let socket = self.run_dir.join("domains/00000000-0000-0000-0000-000000000000/vmm.sock");
        if socket.as_os_str().len() > 107 {
            let longest = 107 - (socket.as_os_str().len() - self.run_dir.as_os_str().len());
            return bad(
                "--run-dir",
                format!("is too long for sockets; at most {longest} characters"),
            );
        }
        Ok(())
    }
}

pub(crate) fn parse_id(value: &str) -> Result<String, String> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = value.as_bytes();
    let right = (1..=63).contains(&bytes.len())
        && bytes.iter().all(|&b| inner(b) || b == b'-')
        && inner(bytes[0])
        && inner(bytes[bytes.len() - 1]);
    if right {
        return Ok(value.to_owned());
    }
    Err("1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit".into())
}

fn parse_cluster(value: &str) -> Result<String, String> {
    let right = (1..=128).contains(&value.len()) && value.bytes().all(|b| b.is_ascii_graphic());
    if right { Ok(value.to_owned()) } else { Err("1 to 128 printable characters".into()) }
}

/// HOST:PORT, or HOST with the default port.
fn parse_controller(value: &str) -> Result<String, String> {
    let wrong = || "give HOST:PORT, such as 10.0.0.11:7400 or controller-0:7400".to_owned();
    let (host, port) = match value.rsplit_once(':') {
        // A bare IPv6 address is not host and port.
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
            (host, port.parse::<u16>().map_err(|_| wrong())?)
        }
        Some(_) => return Err(wrong()),
        None => (value, CONTROLLER_PORT_DEFAULT),
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let right = !bare.is_empty()
        && bare
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':'));
    if !right || port == 0 {
        return Err(wrong());
    }
    Ok(format!("{host}:{port}"))
}

/// Bytes, or with KiB, MiB, GiB, TiB (or K, M, G, T).
fn parse_size(value: &str) -> Result<u64, String> {
    let wrong = || "give a size such as 536870912, 512MiB or 4GiB".to_owned();
    let digits = value.find(|c: char| !c.is_ascii_digit()).unwrap_or(value.len());
    let number: u64 = value[..digits].parse().map_err(|_| wrong())?;
    let shift = match value[digits..].trim() {
        "" | "B" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(extra: &[&str]) -> Result<Options, String> {
        let base = ["drover-agent", "--node", "host1", "--cluster-id", "c1"];
        Options::try_parse_from(base.iter().chain(extra)).map_err(|err| err.to_string())
    }

    #[test]
    fn a_wrong_value_names_its_flag() {
        let controller = ["--controller", "10.77.0.11:7400"];
        assert!(parse(&controller).is_ok());
        assert!(parse(&[]).unwrap_err().contains("--controller"));
        for (flag, value) in [
            ("--node", "a/b"),
            ("--node", ""),
            ("--cluster-id", ""),
            ("--controller", "x:y"),
            ("--controller", "::1"),
            ("--listen", "host"),
            ("--migration-address", "10.77"),
            ("--pool", "main"),
            ("--pool", "main=zfs:tank"),
            ("--pool", "MAIN=dir:/srv"),
            ("--vcpu-overcommit", "0"),
            ("--memory-reserved", "12Q"),
            ("--memory-reserved", "99999999999TiB"),
        ] {
            let right = ["--node", "h", "--cluster-id", "c", "--controller", "c1"];
            let others = right.chunks(2).filter(|pair| pair[0] != flag).flatten().copied();
            let args = ["drover-agent"].into_iter().chain(others).chain([flag, value]);
            let Err(err) = Options::try_parse_from(args) else {
                panic!("{flag} {value}: accepted")
            };
            let err = err.to_string();
            assert!(err.contains("invalid value") || err.contains("a value is required"), "{err}");
            assert!(err.contains(flag), "{flag} {value}: {err}");
        }
    }

    #[test]
    fn addresses_follow_from_the_flags() {
        let with = |args: &[&str]| {
            let controller = ["--controller", "c1,c2:7500"];
            let args: Vec<&str> = controller.iter().chain(args).copied().collect();
            let options = parse(&args).unwrap();
            assert_eq!(options.controllers, ["c1:7400", "c2:7500"]);
            options.addresses()
        };
        let err = with(&[]).unwrap_err().to_string();
        assert!(err.starts_with("--migration-address"), "{err}");
        assert!(with(&["--migration-address", "0.0.0.0"]).is_err());
        let both = with(&["--migration-address", "10.77.0.101"]).unwrap();
        assert_eq!(both.advertise, "10.77.0.101:7401");
        assert_eq!(both.migration_listen, "10.77.0.101:0");
        let apart = with(&["--listen", "10.1.0.1:99", "--migration-address", "fd00::1"]).unwrap();
        assert_eq!(apart.advertise, "10.1.0.1:99");
        assert_eq!(apart.migration_listen, "[fd00::1]:0");
        let told = with(&["--listen", "10.1.0.1:99", "--advertise", "host1:7401"]).unwrap();
        assert_eq!(told.advertise, "host1:7401");
        assert_eq!(told.migration_listen, "10.1.0.1:0");
    }

    #[test]
    fn pools_are_listed() {
        let controller = ["--controller", "c1"];
        let with = |args: &[&str]| {
            let args: Vec<&str> = controller.iter().chain(args).copied().collect();
            parse(&args).unwrap().pools.into_iter().map(|pool| pool.id).collect::<Vec<_>>()
        };
        assert_eq!(with(&[]), [""; 0]);
        let two = ["main=lvm:vg0/thin,overcommit=2.0", "files=dir:/srv/pool"];
        assert_eq!(with(&["--pool", two[0], "--pool", two[1]]), ["main", "files"]);
        assert_eq!(with(&["--pool", &two.join(";")]), ["main", "files"]);
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        assert_eq!(parse_size("123"), Ok(123));
        assert!(parse_size("MiB").is_err());
    }
}
