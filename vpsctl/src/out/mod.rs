//! What goes to stdout: tables and sentences for people, JSON for programs.

pub(crate) mod human;
pub(crate) mod json;
pub(crate) mod pages;
pub(crate) mod table;

use std::io::Write;

use crate::error::Error;

/// Writes a text that ends with its own newline, at once.
pub(crate) fn print(text: &str) -> Result<(), Error> {
    print_bytes(text.as_bytes())
}

/// The same for what need not be text (a console).
pub(crate) fn print_bytes(bytes: &[u8]) -> Result<(), Error> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|e| match e.kind() {
        std::io::ErrorKind::BrokenPipe => Error::PipeClosed,
        _ => Error::Local(format!("stdout: {e}")),
    })
}
