//! Cables between two sides, one a connection; one of them is cut, or goes silent.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// What happens to a cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// It is cut: both sides see that the connection is gone.
    Cut,
    /// Nothing goes through any more, and nobody is told.
    Silent,
}

/// Which connection, in the order in which they are made, and when: so many bytes went towards the
/// destination, or it has answered so many.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fate {
    pub(crate) connection: usize,
    pub(crate) there_max: u64,
    pub(crate) back_max: u64,
    pub(crate) end: End,
}

/// The cables, for as long as it lives.
pub(crate) struct Cables {
    pub(crate) address: String,
    /// How many connections were made.
    pub(crate) made: Arc<AtomicUsize>,
    over: Arc<(Mutex<bool>, Condvar)>,
}

impl Drop for Cables {
    fn drop(&mut self) {
        *self.over.0.lock().unwrap() = true;
        self.over.1.notify_all();
        // The one who accepts looks.
        let _ = TcpStream::connect(&self.address);
    }
}

/// Passes bytes on until so many went towards the destination over the first connection, or it has
/// answered so many there; then that cable is cut.
pub(crate) fn proxy(to: &str, there_max: u64, back_max: u64) -> Cables {
    cables(to, Fate { connection: 0, there_max, back_max, end: End::Cut })
}

pub(crate) fn cables(to: &str, fate: Fate) -> Cables {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let to = to.to_owned();
    let over = Arc::new((Mutex::new(false), Condvar::new()));
    let made = Arc::new(AtomicUsize::new(0));
    let (its_over, its_made) = (Arc::clone(&over), Arc::clone(&made));
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let (near, over) = (near.unwrap(), &its_over);
            if *over.0.lock().unwrap() {
                return;
            }
            let number = its_made.fetch_add(1, Ordering::SeqCst);
            let far = TcpStream::connect(&to).unwrap();
            let hit = fate.connection == number;
            let max = |max| if hit { max } else { u64::MAX };
            let there = (near.try_clone().unwrap(), far.try_clone().unwrap(), max(fate.there_max));
            for (from, to, max) in [there, (far, near, max(fate.back_max))] {
                let over = Arc::clone(over);
                std::thread::spawn(move || pump(from, to, max, fate.end, &over));
            }
        }
    });
    Cables { address, made, over }
}

fn pump(mut from: TcpStream, mut to: TcpStream, max: u64, end: End, over: &(Mutex<bool>, Condvar)) {
    let mut left = max;
    let mut buffer = [0; 65536];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let pass = (count as u64).min(left) as usize;
        left -= pass as u64;
        if to.write_all(&buffer[..pass]).is_err() {
            break;
        }
        if left == 0 {
            if end == End::Silent {
                drop(over.1.wait_while(over.0.lock().unwrap(), |over| !*over).unwrap());
            }
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
