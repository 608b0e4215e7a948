//! Networks: who has which address.
//!
//! An address is taken when a domain's spec has it. Whoever gives one away also writes the
//! network's row, so two creates at once cannot give the same.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use drover_proto::v1::{Network, NetworkInterface};

use super::begin::{check_etag, etag};
use super::refusal::Refusal;
use super::step::{Context, timestamp};
use crate::model::{NetworkId, NetworkRecord, World};
use crate::scheduler::listed;
use crate::store::{Txn, Versioned};

/// A subnet is no larger than this: addresses are looked for one by one.
pub const PREFIX_MIN: u8 = 16;
/// Nor smaller: first, last and one to give away.
pub const PREFIX_MAX: u8 = 30;
/// A refusal names so many of the domains that are in the way.
const NAMED_MAX: usize = 20;

/// An IPv4 subnet as `10.78.0.0/24`, without bits beyond the prefix.
#[must_use]
pub fn subnet(text: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let (address, prefix): (Ipv4Addr, u8) = (address.parse().ok()?, prefix.parse().ok()?);
    let fine =
        (PREFIX_MIN..=PREFIX_MAX).contains(&prefix) && u32::from(address) & host_bits(prefix) == 0;
    fine.then_some((address, prefix))
}

fn host_bits(prefix: u8) -> u32 {
    u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0)
}

/// First and last of the addresses that a network gives away. The row was checked when it was
/// made.
#[must_use]
pub fn range(network: &Network) -> Option<(Ipv4Addr, Ipv4Addr)> {
    let (base, prefix) = subnet(&network.subnet)?;
    let given = |text: &str, default: u32| {
        if text.is_empty() { Some(Ipv4Addr::from(default)) } else { text.parse().ok() }
    };
    let last = u32::from(base) | host_bits(prefix);
    Some((
        given(&network.first_address, u32::from(base) + 1)?,
        given(&network.last_address, last - 1)?,
    ))
}

/// The addresses of the network that domains have.
#[must_use]
pub fn taken(world: &World, id: &str) -> BTreeSet<String> {
    let name = format!("networks/{id}");
    let specs = world.domains.values().filter_map(|row| row.value.spec.as_ref());
    specs
        .flat_map(|spec| &spec.interfaces)
        .filter(|nic| nic.network == name)
        .flat_map(|nic| nic.addresses.iter().cloned())
        .collect()
}

/// Completes an interface from its network. `used` holds what this very domain was given already.
///
/// # Errors
/// No such network, an address that it does not give away or has given away, or none is left.
pub fn complete(
    world: &World,
    field: &str,
    nic: &mut NetworkInterface,
    used: &mut BTreeSet<String>,
) -> Result<NetworkId, Refusal> {
    let invalid = |name: &str, value: &str, expected: String| Refusal::Invalid {
        field: format!("{field}.{name}"),
        value: value.to_owned(),
        expected,
    };
    let id = NetworkId::from_name(&nic.network)
        .map_err(|bad| invalid("network", &bad.value, bad.expected))?;
    let not_found = || Refusal::NotFound { name: id.name() };
    let row = world.networks.get(id.as_str()).ok_or_else(not_found)?;
    let network = row.value.network.as_ref().ok_or_else(not_found)?;
    let ((_, prefix), (first, last)) =
        subnet(&network.subnet).zip(range(network)).ok_or_else(not_found)?;
    let mut held = taken(world, id.as_str());
    held.extend(used.iter().cloned());
    if !nic.bridge.is_empty() && nic.bridge != network.bridge {
        let expected = format!("empty: {} says which bridge", id.name());
        return Err(invalid("bridge", &nic.bridge, expected));
    }
    if nic.addresses.is_empty() {
        let free = (u32::from(first)..=u32::from(last))
            .map(|address| Ipv4Addr::from(address).to_string())
            .find(|address| !held.contains(address) && *address != network.gateway);
        let free = free.ok_or_else(|| Refusal::Precondition {
            subject: id.name(),
            reason: "NO_ADDRESS",
            message: format!("{} has no address left from {first} to {last}", id.name()),
        })?;
        nic.addresses = vec![free];
    }
    for address in &nic.addresses {
        let inside =
            address.parse::<Ipv4Addr>().is_ok_and(|address| (first..=last).contains(&address));
        if !inside || *address == network.gateway {
            let expected = format!("an address from {first} to {last} that is not the gateway's");
            return Err(invalid("addresses", address, expected));
        }
        if !held.insert(address.clone()) {
            let expected = "an address that no other interface has; empty to have one chosen";
            return Err(invalid("addresses", address, expected.into()));
        }
        used.insert(address.clone());
    }
    nic.bridge.clone_from(&network.bridge);
    nic.prefix_length = u32::from(prefix);
    nic.gateway.clone_from(&network.gateway);
    nic.name_servers.clone_from(&network.name_servers);
    Ok(id)
}

/// Addresses of the network were given away in this transaction.
pub(super) fn give(cx: &Context<'_>, id: &NetworkId, txn: Txn) -> Result<Txn, Refusal> {
    let row = cx.world.networks.get(id.as_str());
    let row = row.ok_or_else(|| Refusal::NotFound { name: id.name() })?;
    let mut record = row.value.clone();
    record.address_generation += 1;
    Ok(txn.unchanged(row).put(&record))
}

/// Makes a network, which was checked.
///
/// # Errors
/// The name is taken.
pub fn create(cx: &Context<'_>, id: &NetworkId, network: &Network) -> Result<Txn, Refusal> {
    if cx.world.networks.contains_key(id.as_str()) {
        return Err(Refusal::AlreadyExists { name: id.name() });
    }
    let network = Network {
        name: id.name(),
        create_time: Some(timestamp(cx.now.wall_ms)),
        ..network.clone()
    };
    let record =
        NetworkRecord { id: id.as_str().to_owned(), network: Some(network), address_generation: 0 };
    Ok(Txn::new().term_is(cx.term).absent::<NetworkRecord>(id.as_str()).put(&record))
}

/// Forgets a network that no domain has an interface in.
///
/// # Errors
/// No such network, it has changed, or domains are in it.
pub fn delete(cx: &Context<'_>, id: &NetworkId, given: &str) -> Result<Txn, Refusal> {
    let row = cx.world.networks.get(id.as_str());
    let row = row.ok_or_else(|| Refusal::NotFound { name: id.name() })?;
    check_etag(&id.name(), given, row.mod_revision)?;
    let name = id.name();
    let inside = cx.world.domains.values().filter(|row| {
        let nics = row.value.spec.iter().flat_map(|spec| &spec.interfaces);
        nics.into_iter().any(|nic| nic.network == name)
    });
    let inside: Vec<String> = inside.map(|row| format!("domains/{}", row.value.id)).collect();
    if !inside.is_empty() {
        return Err(Refusal::Precondition {
            subject: id.name(),
            reason: "NETWORK_IN_USE",
            message: format!(
                "{name} has interfaces of {}: delete them first",
                listed(inside.into_iter(), NAMED_MAX, ", ")
            ),
        });
    }
    Ok(Txn::new().term_is(cx.term).unchanged(row).delete::<NetworkRecord>(id.as_str()))
}

/// As callers see it.
#[must_use]
pub fn present(world: &World, row: &Versioned<NetworkRecord>) -> Network {
    let network = row.value.network.clone().unwrap_or_default();
    let (first, last) = range(&network).unwrap_or((Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED));
    let within =
        |address: &str| address.parse::<Ipv4Addr>().is_ok_and(|a| (first..=last).contains(&a));
    let gateway = u32::from(within(&network.gateway));
    Network {
        addresses_used: u32::try_from(taken(world, &row.value.id).len()).unwrap_or(u32::MAX),
        addresses_total: (u32::from(last) - u32::from(first) + 1).saturating_sub(gateway),
        first_address: first.to_string(),
        last_address: last.to_string(),
        etag: etag(row.mod_revision),
        ..network
    }
}
