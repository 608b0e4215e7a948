//! `vpsctl network`.

use clap::{Args, Subcommand};

use crate::parse;

#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// Say which addresses domains are given, and on which bridge
    #[command(after_help = "\
Examples:
  vpsctl network create lan --subnet 10.0.0.0/24 --gateway 10.0.0.1 --dns 10.0.0.53
  vpsctl network create dmz --subnet 192.0.2.0/24 --first 192.0.2.100 --last 192.0.2.199 \\
      --bridge br-dmz
  vpsctl domain create web1 --memory 1GiB --disk image=debian13,size=10GiB --network lan")]
    Create(CreateNetworkArgs),
    /// List the networks and how many of their addresses are taken
    List,
    /// Show one network
    Show(NetworkName),
    /// Delete a network in which no domain has an interface
    Delete(NetworkName),
}

#[derive(Args, Debug)]
pub(crate) struct NetworkName {
    /// The network, such as lan or networks/lan
    #[arg(value_name = "NETWORK", value_parser = parse::network)]
    pub(crate) network: String,
}

#[derive(Args, Debug)]
pub(crate) struct CreateNetworkArgs {
    #[command(flatten)]
    pub(crate) name: NetworkName,
    /// Its IPv4 subnet, such as 10.0.0.0/24
    #[arg(long, value_name = "SUBNET", value_parser = parse::subnet)]
    pub(crate) subnet: String,
    /// The gateway, in the subnet [default: none]
    #[arg(long, value_name = "ADDRESS", value_parser = parse::ipv4)]
    pub(crate) gateway: Option<String>,
    /// A name server; may be repeated, up to 4
    #[arg(long, value_name = "ADDRESS", value_parser = parse::address)]
    pub(crate) dns: Vec<String>,
    /// First address to give away [default: the subnet's second]
    #[arg(long, value_name = "ADDRESS", value_parser = parse::ipv4)]
    pub(crate) first: Option<String>,
    /// Last address to give away [default: the subnet's last but one]
    #[arg(long, value_name = "ADDRESS", value_parser = parse::ipv4)]
    pub(crate) last: Option<String>,
    /// The bridge on the nodes [default: the agent's own]
    #[arg(long, value_name = "BRIDGE")]
    pub(crate) bridge: Option<String>,
}
