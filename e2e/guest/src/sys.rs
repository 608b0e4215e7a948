//! The kernel's side: mounts, modules, the console, the network, the ways to end.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Mounts /proc, /sys and /dev.
pub(crate) fn mount_kernel_filesystems() -> Result<(), String> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        std::fs::create_dir_all(target).map_err(|e| format!("cannot create {target}: {e}"))?;
        match mount(kind, target, kind, 0) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            other => other.map_err(|e| format!("cannot mount {target}: {e}"))?,
        }
    }
    Ok(())
}

/// mount(2).
pub(crate) fn mount(
    source: &str,
    target: &str,
    kind: &str,
    flags: libc::c_ulong,
) -> io::Result<()> {
    let (source, target, kind) =
        (CString::new(source)?, CString::new(target)?, CString::new(kind)?);
    // SAFETY: three NUL-terminated strings that outlive the call, and no data.
    let result = unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, std::ptr::null())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Standard input, output and error become the console.
pub(crate) fn open_console() -> Result<(), String> {
    let console = File::options()
        .read(true)
        .write(true)
        .open("/dev/console")
        .map_err(|e| format!("cannot open /dev/console: {e}"))?;
    for fd in 0..3 {
        // SAFETY: both are open descriptors, or numbers about to become one.
        if unsafe { libc::dup2(console.as_raw_fd(), fd) } < 0 {
            return Err(format!("dup2 to {fd}: {}", io::Error::last_os_error()));
        }
    }
    if console.as_raw_fd() < 3 {
        std::mem::forget(console);
    }
    Ok(())
}

/// Loads each module of the folder, in the order of the names. A module without its device is
/// no failure; what cannot be loaded is said.
pub(crate) fn load_modules(folder: &str) {
    let mut paths: Vec<_> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    paths.sort();
    for path in paths {
        // A network card says for each frame that it has left, and a guest's processor is woken
        // for that: on an emulated host this costs more than the frame.
        let is_net = path.to_string_lossy().ends_with("-virtio_net.ko");
        let parameters = if is_net { c"napi_tx=0" } else { c"" };
        let loaded = File::open(&path).and_then(|file| {
            // SAFETY: an open descriptor and a parameter string.
            let result = unsafe {
                libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0)
            };
            if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        });
        if let Err(error) = loaded {
            println!("drover-guest: module {}: {error}", path.display());
        }
    }
}

/// Gives `interface` an address (`10.78.0.11/24`) and brings it and `lo` up.
pub(crate) fn configure_network(interface: &str, address: &str) -> Result<(), String> {
    let bad = || format!("drover.ip={address}: expected like 10.78.0.11/24");
    let (ip, bits) = address.split_once('/').ok_or_else(bad)?;
    let ip: Ipv4Addr = ip.parse().map_err(|_| bad())?;
    let bits: u32 = bits.parse().ok().filter(|b| (1..=32).contains(b)).ok_or_else(bad)?;
    let mask = Ipv4Addr::from(u32::MAX << (32 - bits));

    let socket = inet_socket().map_err(|e| format!("cannot open a socket: {e}"))?;
    let failed = |what: &str, e: io::Error| format!("{interface}: cannot {what}: {e}");
    wait_for_interface(interface)?;
    set_address(&socket, interface, libc::SIOCSIFADDR, ip).map_err(|e| failed("set address", e))?;
    set_address(&socket, interface, libc::SIOCSIFNETMASK, mask)
        .map_err(|e| failed("set netmask", e))?;
    bring_up(&socket, interface).map_err(|e| failed("bring up", e))?;
    bring_up(&socket, "lo").map_err(|e| format!("lo: {e}"))
}

fn wait_for_interface(interface: &str) -> Result<(), String> {
    let path = format!("/sys/class/net/{interface}");
    for _ in 0..500 {
        if std::path::Path::new(&path).exists() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Err(format!("{interface}: no such network device after 5 s"))
}

fn inet_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that was just opened and that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn interface_request(interface: &str) -> libc::ifreq {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(15)) {
        *to = from as libc::c_char;
    }
    request
}

fn set_address(
    socket: &OwnedFd,
    interface: &str,
    what: libc::c_ulong,
    address: Ipv4Addr,
) -> io::Result<()> {
    let mut request = interface_request(interface);
    let inet = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from(address).to_be() },
        sin_zero: [0; 8],
    };
    // SAFETY: sockaddr and sockaddr_in have the same size, and any bytes are valid in both.
    request.ifr_ifru.ifru_addr =
        unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(inet) };
    // SAFETY: the ioctl reads one ifreq.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), what, &request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn bring_up(socket: &OwnedFd, interface: &str) -> io::Result<()> {
    let mut request = interface_request(interface);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the ioctl reads one ifreq.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Held while a program runs whose end somebody waits for.
static WAITED_FOR: Mutex<()> = Mutex::new(());

/// Runs a program to its end; its standard output, or what went wrong with what it said.
pub(crate) fn run_program<'a>(
    program: &str,
    arguments: impl Iterator<Item = &'a str>,
) -> Result<String, String> {
    let _alone = WAITED_FOR.lock().unwrap_or_else(PoisonError::into_inner);
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|e| format!("cannot run {program}: {e}\n"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program}: {}: {said}{text}\n", output.status))
}

/// Takes the exit status of every child that ended, as process 1 has to.
pub(crate) fn reap_children() {
    // Not the one of a program whose end somebody waits for.
    let Ok(_alone) = WAITED_FOR.try_lock() else { return };
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result.
        let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
        if pid <= 0 {
            return;
        }
        println!("drover-guest: process {pid} ended with status {status:#x}");
    }
}

/// How a guest can end by its own will.
#[derive(Clone, Copy)]
pub(crate) enum End {
    PowerOff,
    Reboot,
    Panic,
}

impl End {
    pub(crate) fn from_word(word: &str) -> Option<Self> {
        match word {
            "poweroff" => Some(Self::PowerOff),
            "reboot" => Some(Self::Reboot),
            "panic" => Some(Self::Panic),
            _ => None,
        }
    }

    /// Ends the guest.
    pub(crate) fn run(self) {
        let command = match self {
            Self::PowerOff => libc::RB_POWER_OFF,
            Self::Reboot => libc::RB_AUTOBOOT,
            Self::Panic => {
                let done = std::fs::write("/proc/sysrq-trigger", "c");
                println!("drover-guest: still here after the panic: {done:?}");
                return;
            }
        };
        // SAFETY: plain system calls.
        let result = unsafe {
            libc::sync();
            libc::reboot(command)
        };
        println!("drover-guest: reboot() = {result}: {}", io::Error::last_os_error());
    }
}

/// Nanoseconds on one of the kernel's clocks.
pub(crate) fn clock_ns(clock: libc::clockid_t) -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid place for the result.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// Seconds since the kernel started.
pub(crate) fn uptime_seconds() -> String {
    format!("{:.2}", clock_ns(libc::CLOCK_BOOTTIME) as f64 / 1e9)
}

/// Another one after each boot.
pub(crate) fn boot_id() -> &'static str {
    static ID: OnceLock<String> = OnceLock::new();
    ID.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        text.unwrap_or_default().trim().to_owned()
    })
}
