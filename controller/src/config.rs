//! The command line of `drover-controller`, and what it must be to make sense.
//!
//! [`Args`] is what was typed (flags first, then the environment), [`Config`] what it means.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::store::MemberId;

/// More members make every write slower and no cluster of ours needs them.
const MEMBERS_MAX: usize = 7;
const CLUSTER_ID_LENGTH_MAX: usize = 63;
const NODE_LEASE_MIN: Duration = Duration::from_secs(3);
const NODE_LEASE_MAX: Duration = Duration::from_secs(600);
const REPORT_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// The controller of a Drover cluster: one of (usually) three members that replicate the
/// cluster's state with Raft. Any member answers any call.
///
/// It ends with 0 after SIGTERM or SIGINT, 2 when the flags make no sense, 1 when it cannot go
/// on; the last line says why.
#[derive(Clone, Debug, Parser)]
#[command(name = "drover-controller", version, max_term_width = 100)]
pub struct Args {
    /// This member's number, 1 or more; one of those that --member names.
    #[arg(long, env = "DROVER_ID", value_name = "NUMBER")]
    pub id: MemberId,

    /// Directory of its data. Made at the first start, for this member of this cluster.
    #[arg(long, env = "DROVER_DATA_DIR", value_name = "DIRECTORY")]
    pub data_dir: PathBuf,

    /// Where it listens, for everything: API, agents, other members.
    #[arg(long, env = "DROVER_LISTEN", value_name = "IP:PORT", default_value = "0.0.0.0:7400")]
    pub listen: String,

    /// Where others reach it. The address that --member gives this member unless set; the
    /// two must be equal.
    #[arg(long, env = "DROVER_ADVERTISE", value_name = "HOST:PORT")]
    pub advertise: Option<String>,

    /// The cluster's name; members and agents with another one are refused.
    #[arg(long, env = "DROVER_CLUSTER_ID", value_name = "NAME")]
    pub cluster_id: String,

    /// A member and where it is reached, itself included; once for each (in the environment:
    /// separated by commas). None means that this member is alone.
    #[arg(
        long = "member",
        env = "DROVER_MEMBERS",
        value_name = "NUMBER=HOST:PORT",
        value_delimiter = ','
    )]
    pub members: Vec<String>,

    /// Collector of traces, http://HOST:PORT; none are sent without it.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,

    /// A node that is not heard for so long is lost (3s to 10m).
    #[arg(long, env = "DROVER_NODE_LEASE", value_name = "DURATION", default_value = "15s")]
    pub node_lease: String,

    /// How often agents report at least (100ms to a third of the lease).
    #[arg(long, env = "DROVER_REPORT_INTERVAL", value_name = "DURATION", default_value = "1s")]
    pub report_interval: String,
}

/// How a controller runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This member.
    pub id: MemberId,
    /// Its data.
    pub data_dir: PathBuf,
    /// Where it listens.
    pub listen: SocketAddr,
    /// Where others reach it, `host:port`.
    pub advertise: String,
    /// The cluster.
    pub cluster_id: String,
    /// Every member's `host:port`, this one's too.
    pub members: BTreeMap<MemberId, String>,
    /// Collector of traces.
    pub otlp_endpoint: Option<String>,
    /// After this, a silent node is lost.
    pub node_lease: Duration,
    /// How often agents report at least.
    pub report_interval: Duration,
}

/// A flag that makes no sense: which one, its value, and what is accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{flag} \"{value}\": {expected}")]
pub struct ConfigError {
    flag: &'static str,
    value: String,
    expected: String,
}

fn wrong(flag: &'static str, value: impl ToString, expected: impl Into<String>) -> ConfigError {
    ConfigError { flag, value: value.to_string(), expected: expected.into() }
}

impl Args {
    /// What the flags mean.
    ///
    /// # Errors
    /// The first flag that makes no sense.
    pub fn validate(self) -> Result<Config, ConfigError> {
        if self.id == 0 {
            return Err(wrong("--id", 0, "members are numbered from 1"));
        }
        let name = &self.cluster_id;
        let fits = (1..=CLUSTER_ID_LENGTH_MAX).contains(&name.len())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        if !fits {
            let expected = format!(
                "1 to {CLUSTER_ID_LENGTH_MAX} letters, digits, '-', '_' and '.' are accepted"
            );
            return Err(wrong("--cluster-id", name, expected));
        }
        if self.data_dir.as_os_str().is_empty() {
            return Err(wrong("--data-dir", "", "give the path of a directory"));
        }
        let listen: SocketAddr = self
            .listen
            .parse()
            .map_err(|_| wrong("--listen", &self.listen, "give IP:PORT, like 0.0.0.0:7400"))?;
        let (advertise, members) = self.addresses(listen)?;
        let (node_lease, report_interval) = self.times()?;
        Ok(Config {
            id: self.id,
            data_dir: self.data_dir,
            listen,
            advertise,
            cluster_id: self.cluster_id,
            members,
            otlp_endpoint: self.otlp_endpoint.filter(|url| !url.is_empty()),
            node_lease,
            report_interval,
        })
    }

    fn addresses(
        &self,
        listen: SocketAddr,
    ) -> Result<(String, BTreeMap<MemberId, String>), ConfigError> {
        let mut members = BTreeMap::new();
        for text in self.members.iter().filter(|text| !text.is_empty()) {
            let (id, address) = parse_member(text)?;
            if members.values().any(|known| *known == address) {
                return Err(wrong("--member", text, "two members have this address"));
            }
            if members.insert(id, address).is_some() {
                return Err(wrong("--member", text, "this member is named twice"));
            }
        }
        if let Some(address) = &self.advertise {
            check_address("--advertise", address)?;
        }
        if members.is_empty() {
            let address = self.advertise.clone().unwrap_or_else(|| listen.to_string());
            members.insert(self.id, address);
        }
        if members.len() > MEMBERS_MAX {
            let expected = format!("at most {MEMBERS_MAX} members are accepted");
            return Err(wrong("--member", members.len(), expected));
        }
        let ids: Vec<_> = members.keys().collect();
        let own = members.get(&self.id).ok_or_else(|| {
            wrong("--id", self.id, format!("--member names {ids:?}; name this member too"))
        })?;
        match &self.advertise {
            Some(address) if address != own => {
                let expected = format!("--member gives member {} the address {own}", self.id);
                Err(wrong("--advertise", address, expected))
            }
            _ => Ok((own.clone(), members)),
        }
    }

    fn times(&self) -> Result<(Duration, Duration), ConfigError> {
        let lease = parse_duration(&self.node_lease)
            .filter(|lease| (NODE_LEASE_MIN..=NODE_LEASE_MAX).contains(lease))
            .ok_or_else(|| wrong("--node-lease", &self.node_lease, "give 3s to 10m"))?;
        let interval = parse_duration(&self.report_interval)
            .filter(|interval| (REPORT_INTERVAL_MIN..=lease / 3).contains(interval))
            .ok_or_else(|| {
                let expected = "give 100ms to a third of --node-lease";
                wrong("--report-interval", &self.report_interval, expected)
            })?;
        Ok((lease, interval))
    }
}

fn parse_member(text: &str) -> Result<(MemberId, String), ConfigError> {
    let expected = "give NUMBER=HOST:PORT, like 1=10.0.0.1:7400; numbers begin with 1";
    let (id, address) = text.split_once('=').ok_or_else(|| wrong("--member", text, expected))?;
    let id: MemberId = id.parse().map_err(|_| wrong("--member", text, expected))?;
    if id == 0 {
        return Err(wrong("--member", text, expected));
    }
    check_address("--member", address)?;
    Ok((id, address.to_owned()))
}

fn check_address(flag: &'static str, address: &str) -> Result<(), ConfigError> {
    let good = address.rsplit_once(':').is_some_and(|(host, port)| {
        let bracketed = host.starts_with('[') && host.ends_with(']');
        let plain = !host.is_empty() && !host.contains([':', '/', ' ', '@']);
        (bracketed || plain) && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    // A wildcard is a place to listen at, not one to call.
    let wildcard = address.parse::<SocketAddr>().is_ok_and(|a| a.ip().is_unspecified());
    match (good, wildcard) {
        (true, false) => Ok(()),
        (true, true) => Err(wrong(flag, address, "nobody can be reached at a wildcard address")),
        (false, _) => Err(wrong(flag, address, "give HOST:PORT, like 10.0.0.1:7400")),
    }
}

/// `500ms`, `15s`, `2m`, `1h`.
fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.checked_mul(ms).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(flags: &str) -> Result<Config, ConfigError> {
        let program = std::iter::once("drover-controller");
        Args::try_parse_from(program.chain(flags.split_whitespace())).unwrap().validate()
    }

    const THREE: &str = "--id 2 --data-dir d --listen 127.0.0.1:7402 --cluster-id lab \
        --member 1=10.0.0.1:7400 --member 2=host-2:7400 --member 3=[::1]:7400";

    #[test]
    fn three_members() {
        let config = parse(THREE).unwrap();
        assert_eq!(config.advertise, "host-2:7400");
        assert_eq!(config.members.len(), 3);
        assert_eq!(config.node_lease, Duration::from_secs(15));
        assert_eq!(config.report_interval, Duration::from_secs(1));
    }

    #[test]
    fn alone() {
        let config = parse("--id 1 --data-dir d --listen 127.0.0.1:7400 --cluster-id lab").unwrap();
        assert_eq!(config.members, BTreeMap::from([(1, "127.0.0.1:7400".to_owned())]));
    }

    /// Each error names the flag and what would be accepted.
    #[test]
    fn nonsense() {
        let cases = [
            ("--id 0", "--id \"0\": members are numbered from 1"),
            ("--id 4", "--id \"4\": --member names [1, 2, 3]"),
            ("--cluster-id a/b", "--cluster-id \"a/b\": 1 to 63 letters"),
            ("--listen lab", "--listen \"lab\": give IP:PORT"),
            ("--advertise 10.0.0.9:7400", "--advertise \"10.0.0.9:7400\": --member gives member 2"),
            ("--member 4", "--member \"4\": give NUMBER=HOST:PORT"),
            ("--member 0=a:1", "--member \"0=a:1\": give NUMBER=HOST:PORT"),
            ("--member 3=b:1", "--member \"3=b:1\": this member is named twice"),
            ("--member 4=10.0.0.1:7400", "two members have this address"),
            ("--member 4=a:0", "--member \"a:0\": give HOST:PORT"),
            ("--member 4=0.0.0.0:7400", "wildcard"),
            ("--node-lease 1s", "--node-lease \"1s\": give 3s to 10m"),
            ("--node-lease soon", "--node-lease \"soon\""),
            ("--report-interval 10s", "--report-interval \"10s\": give 100ms to a third"),
        ];
        for (flags, expected) in cases {
            let mut args = THREE.to_owned();
            for flag in ["--id", "--listen", "--cluster-id"] {
                if flags.starts_with(flag) {
                    let at = args.find(flag).unwrap();
                    let end = args[at..].match_indices(" --").next().unwrap().0;
                    args.replace_range(at..at + end, "");
                }
            }
            let error = parse(&format!("{args} {flags}")).unwrap_err().to_string();
            assert!(error.contains(expected), "{flags}: {error}");
        }
    }
}
