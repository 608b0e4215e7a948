//! The seed of a domain: the small disk by which cloud-init in the guest learns its name, keys
//! and addresses. It is made of the specification alone, so that two nodes make the same one,
//! and lies among the domain's files for as long as the domain is here.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use drover_hv::config::FieldError;
use drover_proto::v1::NetworkInterface;

use crate::error::Error;
use crate::seed::{Addressing, Interface, Prefix, Seed};
use crate::wanted::Assigned;

/// The seed's disk; `None` for a domain that gets none.
///
/// # Errors
/// The first field that is not accepted, as the specification calls it.
pub(super) fn seed_bytes(uid: &str, assigned: &Assigned) -> Result<Option<Vec<u8>>, Error> {
    let Some(cloud_init) = &assigned.spec.cloud_init else { return Ok(None) };
    let id = assigned.name.strip_prefix("domains/").unwrap_or(&assigned.name);
    let host_name = if cloud_init.host_name.is_empty() { id } else { &cloud_init.host_name };
    let interfaces = assigned.spec.interfaces.iter().enumerate();
    // One without a network is the guest's own business.
    let interfaces = interfaces.filter(|(_, interface)| !interface.network.is_empty());
    let interfaces: Result<Vec<Interface>, FieldError> =
        interfaces.map(|(index, interface)| configured(index, interface)).collect();
    let seed = Seed {
        instance_id: uid.to_owned(),
        host_name: host_name.to_owned(),
        ssh_keys: cloud_init.ssh_authorized_keys.clone(),
        user_data: cloud_init.user_data.clone(),
        interfaces: interfaces.map_err(in_words)?,
    };
    seed.disk().map(Some).map_err(in_words)
}

fn in_words(error: FieldError) -> Error {
    Error::Domain(format!("cloud_init: {error}"))
}

fn configured(index: usize, interface: &NetworkInterface) -> Result<Interface, FieldError> {
    let field = |name: &str| format!("interfaces[{index}].{name}");
    let address = |name: &str, text: &str| {
        text.parse::<IpAddr>().map_err(|_| FieldError::new(field(name), text, "an IP address"))
    };
    let mac = interface.mac.parse().map_err(|_| {
        FieldError::new(field("mac"), &interface.mac, "an address such as 52:54:00:12:34:56")
    })?;
    let bits = u8::try_from(interface.prefix_length).ok();
    let addresses = interface.addresses.iter().map(|text| {
        let address = address("addresses", text)?;
        let bits_max = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.filter(|bits| (1..=bits_max).contains(bits)).ok_or_else(|| {
            let accepted = format!("1 to {bits_max}");
            FieldError::new(field("prefix_length"), interface.prefix_length, accepted)
        })?;
        Ok(Prefix { address, bits })
    });
    let addresses = addresses.collect::<Result<Vec<_>, FieldError>>()?;
    if addresses.is_empty() {
        return Err(FieldError::new(field("addresses"), "", "an address of its network"));
    }
    let gateways = Some(&interface.gateway).filter(|gateway| !gateway.is_empty());
    let gateways = gateways.iter().map(|gateway| address("gateway", gateway));
    let name_servers = interface.name_servers.iter().map(|server| address("name_servers", server));
    Ok(Interface {
        mac,
        addressing: Addressing::Static {
            addresses,
            gateways: gateways.collect::<Result<_, _>>()?,
            name_servers: name_servers.collect::<Result<_, _>>()?,
        },
    })
}

/// Puts the seed in its place, or takes an earlier one away. Needs no fsync: it is made again
/// before each start.
pub(super) fn place(path: &Path, seed: Option<&[u8]>) -> Result<(), Error> {
    let Some(bytes) = seed else { return Ok(drover_storage::remove(path)?) };
    // A VMM that is just ending may have the old one open: that file is left to it.
    let temporary = path.with_extension("img.new");
    fs::write(&temporary, bytes).map_err(|err| Error::io("write", &temporary, err))?;
    fs::rename(&temporary, path).map_err(|err| Error::io("rename to", path, err))
}
