//! What a customer runs on a VPS: a website with a counter in memory and a journal on disk.

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use crate::client::fetch_slow;
use crate::{Error, Result, paths};

const PROGRAM: &str = include_str!("website.py");
/// For a check, which reads the whole journal from the disk.
const CHECK_PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// The user data that set it up, as a file of this lab.
pub fn user_data(lab: &str) -> Result<PathBuf> {
    let path = paths::run_dir(lab).join("website.sh");
    let program = "/usr/local/lib/website.py";
    let script = format!(
        "#!/bin/sh\nset -e\ncat > {program} <<'END'\n{PROGRAM}END\n\
         systemd-run --unit website --property Restart=on-failure python3 {program}\n"
    );
    fs::write(&path, script).map_err(Error::io("cannot write", &path))?;
    Ok(path)
}

/// Has it read its memory and its journal again; asked from a thread in the namespace.
pub fn check(name: &str, address: Ipv4Addr) -> Result<()> {
    let body = fetch_slow(address, "/check", CHECK_PATIENCE)?;
    if body.ends_with("\nwrong_words 0\n") {
        return Ok(());
    }
    Err(Error::other(format!("{name}: memory or disk are not as they were written: {body:?}")))
}
