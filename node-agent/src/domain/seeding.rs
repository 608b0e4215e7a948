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
    // Another system with another instance: it takes the keys and addresses anew, and the domain's
    // own system does not take itself for a clone afterwards.
    let instance_id = if assigned.rescue { format!("{uid}-rescue") } else { uid.to_owned() };
    let seed = Seed {
        instance_id,
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

#[cfg(test)]
mod tests {
    use drover_proto::v1::{CloudInit, DomainSpec};

    use super::*;
    use crate::wanted::Role;

    const UID: &str = "4d8e0f0e-6c6f-4d3b-8f1e-0c6f7a9b2d11";

    fn interface() -> NetworkInterface {
        NetworkInterface {
            mac: "52:54:00:00:00:01".into(),
            addresses: vec!["10.78.0.11".into()],
            network: "networks/front".into(),
            prefix_length: 24,
            gateway: "10.78.0.1".into(),
            name_servers: vec!["10.78.0.2".into()],
            ..NetworkInterface::default()
        }
    }

    fn assigned(epoch: u64, role: Role, interfaces: Vec<NetworkInterface>) -> Assigned {
        let cloud_init = Some(CloudInit {
            ssh_authorized_keys: vec!["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA== me".into()],
            user_data: "#!/bin/sh\necho made by a tenant\n".into(),
            ..CloudInit::default()
        });
        let spec = DomainSpec { cloud_init, interfaces, ..DomainSpec::default() };
        let name = "domains/web".into();
        Assigned {
            name,
            epoch,
            spec,
            role,
            disks: vec![],
            rescue: false,
            generation_id: None,
            memory: None,
            seed_slot: None,
        }
    }

    fn incoming() -> Role {
        Role::Incoming { migration_id: "m".into(), token: "t".into() }
    }

    fn owner() -> Role {
        Role::Owner(crate::wanted::Owner {
            power: crate::wanted::Power::Running,
            grace: Default::default(),
            start_generation: 1,
            outgoing: None,
        })
    }

    /// Source and destination of a migration show the guest the same disk.
    #[test]
    fn a_seed_comes_of_the_specification_alone() {
        let silent = NetworkInterface { mac: "52:54:00:00:00:02".into(), ..Default::default() };
        let interfaces = || vec![interface(), silent.clone()];
        let make = |assigned| seed_bytes(UID, &assigned).unwrap().unwrap();
        let here = make(assigned(3, owner(), interfaces()));
        assert_eq!(here, make(assigned(4, incoming(), interfaces())));
        let text = String::from_utf8_lossy(&here);
        let told = [UID, "web", "AAAAC3NzaC1lZDI1NTE5", "made by a tenant", "10.78.0.11/24"];
        for words in told.iter().chain(&["10.78.0.1", "10.78.0.2", "52:54:00:00:00:01"]) {
            assert!(text.contains(words), "{words}");
        }
        assert!(!text.contains("52:54:00:00:00:02"), "it has no network");
        let none = Assigned { spec: DomainSpec::default(), ..assigned(3, owner(), vec![]) };
        assert_eq!(seed_bytes(UID, &none).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_told_names_its_field() {
        for (wrong, words) in [
            (NetworkInterface { mac: "x".into(), ..interface() }, "interfaces[0].mac: x"),
            (NetworkInterface { addresses: vec![], ..interface() }, "interfaces[0].addresses"),
            (NetworkInterface { prefix_length: 33, ..interface() }, "prefix_length: 33"),
            (NetworkInterface { prefix_length: 0, ..interface() }, "prefix_length: 0"),
            (NetworkInterface { gateway: "gw".into(), ..interface() }, "gateway: gw"),
            (
                NetworkInterface { name_servers: vec!["ns".into()], ..interface() },
                "name_servers: ns",
            ),
        ] {
            let error = seed_bytes(UID, &assigned(3, owner(), vec![wrong])).unwrap_err();
            let error = error.to_string();
            assert!(error.starts_with("cloud_init: ") && error.contains(words), "{error}");
        }
    }
}
