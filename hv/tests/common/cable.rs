//! A cable that is cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

/// Passes bytes on until so many went towards the destination, or it has answered so many; then
/// the cable is cut.
pub(crate) fn proxy(to: &str, there_max: u64, back_max: u64) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let to = to.to_owned();
    std::thread::spawn(move || {
        let (near, _) = listener.accept().unwrap();
        let far = TcpStream::connect(to).unwrap();
        let pump = |mut from: TcpStream, mut to: TcpStream, max: u64| {
            move || {
                let mut left = max;
                let mut buffer = [0; 65536];
                while let Ok(count @ 1..) = from.read(&mut buffer) {
                    let pass = (count as u64).min(left) as usize;
                    left -= pass as u64;
                    if to.write_all(&buffer[..pass]).is_err() || left == 0 {
                        break;
                    }
                }
                let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
            }
        };
        let mut there = pump(near.try_clone().unwrap(), far.try_clone().unwrap(), there_max);
        let back = std::thread::spawn(pump(far, near, back_max));
        there();
        back.join().unwrap();
    });
    address
}
