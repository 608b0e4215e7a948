//! Networks.

use std::time::SystemTime;

use drover_proto::v1::Network;

use super::Page;
use crate::out::{
    human::{age, or_dash, short},
    table::Table,
};

/// The networks and how many of their addresses are taken.
pub(crate) fn networks(networks: &[Network], now: SystemTime) -> String {
    let mut table =
        Table::new(&["NAME", "SUBNET", "GATEWAY", "NAME SERVERS", "BRIDGE", "ADDRESSES", "AGE"]);
    for network in networks {
        table.row(vec![
            short(&network.name).to_owned(),
            network.subnet.clone(),
            or_dash(&network.gateway),
            or_dash(&network.name_servers.join(" ")),
            or_dash(&network.bridge),
            format!("{} / {}", network.addresses_used, network.addresses_total),
            age(network.create_time.as_ref(), now),
        ]);
    }
    table.render()
}

/// One network.
pub(crate) fn network(network: &Network, now: SystemTime) -> String {
    let mut page = Page::default();
    page.line("network", short(&network.name));
    page.line("subnet", &network.subnet);
    page.line("gateway", &network.gateway);
    page.line("name servers", &network.name_servers.join(" "));
    let bridge = if network.bridge.is_empty() { "the node's own" } else { &network.bridge };
    page.line("bridge", bridge);
    if !network.first_address.is_empty() || !network.last_address.is_empty() {
        let (first, last) = (or_dash(&network.first_address), or_dash(&network.last_address));
        page.line("gives away", &format!("{first} to {last}"));
    }
    let taken = format!("{} of {} taken", network.addresses_used, network.addresses_total);
    page.line("addresses", &taken);
    page.line("created", &format!("{} ago", age(network.create_time.as_ref(), now)));
    page.text
}
