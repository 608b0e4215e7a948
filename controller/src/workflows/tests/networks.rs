//! Addresses: given once, only from the network's range, and back when the domain is gone.

use std::collections::BTreeSet;

use drover_proto::v1::{Network, NetworkInterface};

use super::lab::{Lab, new_domain, split};
use crate::model::NetworkId;
use crate::workflows::begin::{self, NewDomain};
use crate::workflows::{Refusal, network};

fn lab() -> Lab {
    let mut lab = Lab::with_nodes(&["a"]);
    let network = Network {
        subnet: "10.0.0.0/29".into(),
        gateway: "10.0.0.1".into(),
        last_address: "10.0.0.4".into(),
        name_servers: vec!["9.9.9.9".into()],
        bridge: "br7".into(),
        ..Network::default()
    };
    let id = NetworkId::trusted("lan");
    lab.with(|cx| Ok((network::create(cx, &id, &network)?, ()))).unwrap();
    lab
}

fn interface(address: &str) -> NetworkInterface {
    let addresses = if address.is_empty() { vec![] } else { vec![address.to_owned()] };
    NetworkInterface { network: "networks/lan".into(), addresses, ..NetworkInterface::default() }
}

/// As the API does it: completed and created from one look at the rows.
fn create(lab: &mut Lab, id: &str, mut nic: NetworkInterface) -> Result<NetworkInterface, Refusal> {
    lab.with(|cx| {
        let id_of = network::complete(cx.world, "nic", &mut nic, &mut BTreeSet::new())?;
        let mut new = NewDomain { networks: [id_of].into(), ..new_domain(id, Some("a")) };
        new.spec.interfaces = vec![nic.clone()];
        begin::create_domain(cx, &new).map(split)
    })?;
    Ok(nic)
}

#[test]
fn each_domain_gets_an_address_of_its_own_until_none_is_left() {
    let mut lab = lab();
    let first = create(&mut lab, "one", interface("")).unwrap();
    assert_eq!(first.addresses, ["10.0.0.2"], "the gateway's is not given away");
    assert_eq!((first.prefix_length, first.gateway.as_str()), (29, "10.0.0.1"));
    assert_eq!((first.bridge.as_str(), &first.name_servers[..]), ("br7", &["9.9.9.9".into()][..]));

    let asked = create(&mut lab, "three", interface("10.0.0.4")).unwrap();
    assert_eq!(asked.addresses, ["10.0.0.4"]);
    for taken in ["10.0.0.4", "10.0.0.1", "10.0.0.5", "10.0.1.2", "web"] {
        let refused = create(&mut lab, "bad", interface(taken)).unwrap_err().to_string();
        assert!(refused.contains("nic.addresses") && refused.contains(taken), "{refused}");
    }
    assert_eq!(create(&mut lab, "two", interface("")).unwrap().addresses, ["10.0.0.3"]);
    let refused = create(&mut lab, "four", interface("")).unwrap_err().to_string();
    assert!(refused.contains("no address left from 10.0.0.1 to 10.0.0.4"), "{refused}");

    let world = lab.world();
    let shown = network::present(&world, &world.networks["lan"]);
    assert_eq!((shown.addresses_used, shown.addresses_total), (3, 3));
    let refused = lab
        .with(|cx| Ok((network::delete(cx, &NetworkId::trusted("lan"), "")?, ())))
        .unwrap_err()
        .to_string();
    assert!(refused.contains("domains/one, domains/three, domains/two"), "{refused}");
}

/// Two callers who looked at the same rows must not both be accepted.
#[test]
fn two_creates_at_once_do_not_get_the_same_address() {
    let lab = lab();
    let world = lab.world();
    let cx = lab.context(&world);
    let begun = |id: &str| {
        let mut nic = interface("");
        let id_of = network::complete(&world, "nic", &mut nic, &mut BTreeSet::new()).unwrap();
        let mut new = NewDomain { networks: [id_of].into(), ..new_domain(id, Some("a")) };
        new.spec.interfaces = vec![nic];
        begin::create_domain(&cx, &new).unwrap().txn
    };
    let (one, two) = (begun("one"), begun("two"));
    let mut lab = lab;
    assert!(lab.commit(&one));
    assert!(!lab.commit(&two));
}
