//! Entropy: buffers are filled, and a greedy guest gets what a turn allows.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::tests::{BUFFERS, NEXT, TestDriver, VERSION_1, WRITE};

#[test]
fn buffers_are_filled_with_something_else_each_time() {
    let mut driver = TestDriver::new(Box::new(Rng::new()));
    driver.start(VERSION_1);
    driver.descriptor(0, 0, (BUFFERS, 300, WRITE | NEXT, 1));
    driver.descriptor(0, 1, (BUFFERS + 0x1000, 20, WRITE, 0));
    let mut contents = Vec::new();
    for _ in 0..2 {
        driver.offer(0, 0);
        driver.kick(0);
        assert_eq!(driver.wait_used(0), (0, 320));
        let mut bytes = [0u8; 300];
        driver.memory.read_slice(&mut bytes, GuestAddress(BUFFERS)).unwrap();
        assert!(bytes[250..].iter().any(|byte| *byte != 0));
        contents.push(bytes);
    }
    assert_ne!(contents[0], contents[1]);
}

#[test]
fn a_greedy_guest_gets_short_answers_and_all_of_them() {
    let mut driver = TestDriver::new(Box::new(Rng::new()));
    driver.start(VERSION_1);
    driver.descriptor(0, 0, (BUFFERS, 1 << 20, WRITE, 0));
    for _ in 0..10 {
        driver.offer(0, 0);
    }
    driver.kick(0);
    for _ in 0..10 {
        let (head, written) = driver.wait_used(0);
        assert_eq!((head, written as usize), (0, TURN_BYTES_MAX));
    }
}

#[test]
fn a_buffer_to_read_gets_nothing() {
    let mut driver = TestDriver::new(Box::new(Rng::new()));
    driver.start(VERSION_1);
    driver.descriptor(0, 0, (BUFFERS, 64, 0, 0));
    driver.offer(0, 0);
    driver.kick(0);
    assert_eq!(driver.wait_used(0), (0, 0));
}
