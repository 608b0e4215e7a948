//! The other use of this binary: the initramfs of a lab host, which has its system on a disk.

use std::ffi::CString;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::sys;

const DEVICE_PATIENCE: Duration = Duration::from_secs(60);

/// Mounts `device` as the root and becomes its init. Comes back only with an error.
pub(crate) fn hand_over(device: &str) -> Result<(), String> {
    let start = Instant::now();
    while !Path::new(device).exists() {
        if start.elapsed() > DEVICE_PATIENCE {
            return Err(format!("drover.root={device}: no such device"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    std::fs::create_dir_all("/newroot").map_err(|e| format!("/newroot: {e}"))?;
    sys::mount(device, "/newroot", "ext4", libc::MS_NOATIME)
        .map_err(|e| format!("drover.root={device}: cannot mount: {e}"))?;
    switch_root().map_err(|e| format!("drover.root={device}: cannot change root: {e}"))?;
    let init = CString::new("/sbin/init").map_err(|e| e.to_string())?;
    let arguments = [init.as_ptr(), std::ptr::null()];
    // SAFETY: a NUL-terminated path and a NULL-terminated list of arguments.
    unsafe { libc::execv(init.as_ptr(), arguments.as_ptr()) };
    Err(format!("cannot run /sbin/init: {}", io::Error::last_os_error()))
}

fn switch_root() -> io::Result<()> {
    for folder in ["dev", "proc", "sys"] {
        sys::mount(&format!("/{folder}"), &format!("/newroot/{folder}"), "", libc::MS_MOVE)?;
    }
    std::env::set_current_dir("/newroot")?;
    sys::mount(".", "/", "", libc::MS_MOVE)?;
    std::os::unix::fs::chroot(".")?;
    std::env::set_current_dir("/")
}
