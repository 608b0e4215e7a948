//! Makes a NoCloud seed by hand: `seed OUT HOST_NAME SSH_KEY_FILE MAC (ADDRESS/BITS [GATEWAY]|dhcp)`.
//!
//! For work on images, without an agent.

use drover_agent::seed::{Addressing, Interface, Prefix, Seed};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [out, host_name, key, mac, address, gateway @ ..] = arguments.as_slice() else {
        return Err(
            "usage: seed OUT HOST_NAME SSH_KEY_FILE MAC (ADDRESS/BITS [GATEWAY]|dhcp)".into()
        );
    };
    let addressing = match address.split_once('/') {
        None => Addressing::Dhcp,
        Some((address, bits)) => Addressing::Static {
            addresses: vec![Prefix { address: address.parse()?, bits: bits.parse()? }],
            gateways: gateway.iter().map(|text| text.parse()).collect::<Result<_, _>>()?,
            name_servers: Vec::new(),
        },
    };
    let seed = Seed {
        instance_id: format!("{host_name}-1"),
        host_name: (*host_name).to_owned(),
        ssh_keys: vec![std::fs::read_to_string(key)?.trim().to_owned()],
        user_data: String::new(),
        interfaces: vec![Interface { mac: mac.parse()?, addressing }],
    };
    std::fs::write(out, seed.disk()?)?;
    Ok(())
}
