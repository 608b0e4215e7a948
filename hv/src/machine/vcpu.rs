//! A vCPU: a thread that runs the guest, and the handle by which the machine commands it.
//!
//! The thread is either in the guest or *parked*, waiting for the next command; it begins parked.
//! To get it out of the guest, the handle sets the run structure's `immediate_exit` and sends a
//! signal. The handle queues a command first and sets the flag after; the thread clears the flag
//! first and looks for commands after: however they interleave, no command is missed. Before it
//! parks, KVM_RUN is called once more with the flag set, so that an I/O instruction that is half
//! done is completed and the registers are whole.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::process::Pid;
use rustix::thread::gettid;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::exit::GuestExit;
use super::migratable::StateSection;
use super::vcpu_state::{self, VcpuStateError, VcpuStates};
use crate::loader::LoadedKernel;

/// The thread does nothing deep; saving a vCPU's state puts some 10 KiB on the stack.
const STACK_BYTES: usize = 128 << 10;
/// KVM_RUN returns within microseconds of the signal; a host that is overloaded may take long.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// What a vCPU reaches by ports and addresses. Calls come from all vCPUs' threads at once.
pub trait Bus: Send + Sync {
    /// The guest reads a port.
    fn read_port(&self, port: u16, data: &mut [u8]);
    /// The guest writes a port. Answers how that ends the guest, if so.
    fn write_port(&self, port: u16, data: &[u8]) -> Option<GuestExit>;
    /// The guest reads an address without memory.
    fn read_memory(&self, address: u64, data: &mut [u8]);
    /// The guest writes an address without memory.
    fn write_memory(&self, address: u64, data: &[u8]);
}

/// Where the end of the guest is told. Called on a vCPU's thread; must not block.
pub type OnExit = Arc<dyn Fn(GuestExit) + Send + Sync>;

enum Command {
    /// Enter the guest.
    Run,
    /// Stay parked; answered when that is so.
    Park(SyncSender<()>),
    Save(SyncSender<Result<StateSection, VcpuStateError>>),
    Restore(StateSection, SyncSender<Result<(), VcpuStateError>>),
    /// Begin at a kernel's entry.
    SetEntry(LoadedKernel, SyncSender<Result<(), VcpuStateError>>),
    /// Tell the guest, before it runs again, that it was stopped.
    NoteStop(SyncSender<()>),
    /// End the thread.
    End,
}

/// The machine's handle of a vCPU. Dropping it ends the thread.
pub struct Vcpu {
    index: u32,
    /// The run structure's flag, while the thread lives.
    immediate_exit: Arc<Mutex<Option<FlagPointer>>>,
    commands: SyncSender<Command>,
    /// The thread's number, once it has begun.
    tid: Arc<OnceLock<Pid>>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vcpu").field("index", &self.index).finish_non_exhaustive()
    }
}

/// Points into the vCPU's mapped `kvm_run`.
#[derive(Clone, Copy)]
struct FlagPointer(*mut u8);

// SAFETY: it is used as an atomic only, and only while the thread that owns the mapping has not
// taken it out of `Vcpu::immediate_exit`.
unsafe impl Send for FlagPointer {}

impl FlagPointer {
    fn set(self, value: u8) {
        // SAFETY: the byte is inside of the live mapping (see above), and the kernel reads it as
        // a byte, too.
        unsafe { AtomicU8::from_ptr(self.0) }.store(value, Ordering::SeqCst);
    }
}

/// The signal that gets a thread out of the guest.
fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

extern "C" fn do_nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler of the signal that gets vCPUs out of the guest. Once a process.
pub fn install_kick_handler() -> io::Result<()> {
    register_signal_handler(kick_signal(), do_nothing).map_err(io::Error::from)
}

impl Vcpu {
    /// Gives a vCPU its thread, parked.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn spawn(
        index: u32,
        mut fd: VcpuFd,
        states: VcpuStates,
        bus: Arc<dyn Bus>,
        on_exit: OnExit,
    ) -> io::Result<Self> {
        let flag = FlagPointer(&raw mut fd.get_kvm_run().immediate_exit);
        let immediate_exit = Arc::new(Mutex::new(Some(flag)));
        let (commands, receiver) = sync_channel(1);
        let tid = Arc::new(OnceLock::new());
        let tid_there = Arc::clone(&tid);
        let runner = Runner {
            index,
            fd,
            flag,
            states,
            bus,
            on_exit,
            immediate_exit: Arc::clone(&immediate_exit),
            receiver,
        };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let _ = tid_there.set(gettid());
                runner.run();
            })?;
        Ok(Self { index, immediate_exit, commands, tid, thread: Some(thread) })
    }

    /// Its thread's number, once it has begun.
    pub(super) fn tid(&self) -> Option<Pid> {
        self.tid.get().copied()
    }

    /// Lets it run. It must be parked.
    pub fn run(&self) {
        // No kick: the thread is parked, and shall not be thrown out again. Fails only when the
        // thread is gone, which the next answer's absence tells.
        let _ = self.commands.send(Command::Run);
    }

    /// Begins to park it; [`Waiter::wait`] ends that. So several park at the same time.
    pub fn park(&self) -> Waiter<()> {
        self.ask(Command::Park)
    }

    /// Begins to put it at a kernel's entry. It must be parked, and fresh.
    pub fn set_entry(&self, kernel: LoadedKernel) -> Waiter<Result<(), VcpuStateError>> {
        self.ask(|reply| Command::SetEntry(kernel, reply))
    }

    /// Begins to save its state. It must be parked.
    pub fn save(&self) -> Waiter<Result<StateSection, VcpuStateError>> {
        self.ask(Command::Save)
    }

    /// Begins to restore its state. It must be parked.
    pub fn restore(&self, section: StateSection) -> Waiter<Result<(), VcpuStateError>> {
        self.ask(|reply| Command::Restore(section, reply))
    }

    /// Begins to tell the guest, before it runs again, that it was stopped, so that its
    /// watchdogs do not bark. It must be parked.
    pub fn note_stop(&self) -> Waiter<()> {
        self.ask(Command::NoteStop)
    }

    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Waiter<T> {
        let (reply, receiver) = sync_channel(1);
        self.command(command(reply));
        Waiter { index: self.index, receiver }
    }

    fn command(&self, command: Command) {
        // Fails only when the thread is gone, which the answer's absence tells.
        let _ = self.commands.send(command);
        let flag = self.immediate_exit.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(flag), Some(thread)) = (*flag, &self.thread) {
            flag.set(1);
            // Fails only for a thread that has ended.
            let _ = thread.kill(kick_signal());
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.command(Command::End);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed.
            let _ = thread.join();
        }
    }
}

/// An answer to come.
#[derive(Debug)]
#[must_use]
pub struct Waiter<T> {
    index: u32,
    receiver: Receiver<T>,
}

impl<T> Waiter<T> {
    /// Waits for the answer.
    ///
    /// # Errors
    /// When the thread is gone, or did not answer for long.
    pub fn wait(self) -> Result<T, VcpuStateError> {
        self.receiver.recv_timeout(ANSWER_TIMEOUT).map_err(|_| VcpuStateError {
            step: format!("waiting for vCPU {}", self.index),
            reason: format!("no answer within {ANSWER_TIMEOUT:?}"),
        })
    }
}

/// The thread's side.
struct Runner {
    index: u32,
    fd: VcpuFd,
    flag: FlagPointer,
    states: VcpuStates,
    bus: Arc<dyn Bus>,
    on_exit: OnExit,
    immediate_exit: Arc<Mutex<Option<FlagPointer>>>,
    receiver: Receiver<Command>,
}

fn answer<T>(reply: &SyncSender<T>, value: T) {
    // Whoever asked may have given up; the channel has room for one.
    let _ = reply.try_send(value);
}

/// What KVM_RUN came back with.
enum Turn {
    /// Go on.
    Go,
    /// A signal, or the flag.
    Interrupted,
    /// The guest ends.
    End(GuestExit),
}

/// Why the guest was left.
enum Left {
    /// This is to be done.
    For(Command),
    /// The guest ended.
    Ended(GuestExit),
    /// The handle is gone without a word: the machine's thread has panicked.
    Orphaned,
}

impl Runner {
    fn run(mut self) {
        let mut command = None;
        while self.obey(command.take()) {
            match self.run_guest() {
                Left::For(next) => command = Some(next),
                Left::Ended(exit) => (self.on_exit)(exit),
                Left::Orphaned => break,
            }
        }
        // From here on nobody may write the flag: its mapping ends with `fd`.
        *self.immediate_exit.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Parked: obeys commands until one says to run; false when one says to end.
    fn obey(&mut self, first: Option<Command>) -> bool {
        let mut next = first;
        loop {
            let Some(command) = next.take().or_else(|| self.receiver.recv().ok()) else {
                return false;
            };
            match command {
                Command::Run => return true,
                Command::End => return false,
                Command::Park(reply) => answer(&reply, ()),
                Command::SetEntry(kernel, reply) => {
                    answer(&reply, vcpu_state::set_entry(&self.fd, &kernel));
                }
                Command::NoteStop(reply) => {
                    // Refused when the guest has no kvmclock: then it needs no telling.
                    let _ = self.fd.kvmclock_ctrl();
                    answer(&reply, ());
                }
                Command::Save(reply) => answer(&reply, self.states.save(&self.fd, self.index)),
                Command::Restore(section, reply) => {
                    answer(&reply, self.states.restore(&self.fd, self.index, &section));
                }
            }
        }
    }

    /// Runs the guest until there is a command or the guest ends.
    fn run_guest(&mut self) -> Left {
        let mut turn = Turn::Interrupted;
        loop {
            match turn {
                Turn::Interrupted => self.flag.set(0),
                Turn::Go => {}
                Turn::End(exit) => return Left::Ended(exit),
            }
            match self.receiver.try_recv() {
                Ok(command) => {
                    if let Some(exit) = self.complete() {
                        (self.on_exit)(exit);
                    }
                    return Left::For(command);
                }
                Err(TryRecvError::Disconnected) => return Left::Orphaned,
                Err(TryRecvError::Empty) => turn = self.enter(),
            }
        }
    }

    /// Lets KVM finish what the last exit left half done.
    fn complete(&mut self) -> Option<GuestExit> {
        self.flag.set(1);
        loop {
            match self.enter() {
                Turn::Go => {}
                Turn::Interrupted => return None,
                Turn::End(exit) => return Some(exit),
            }
        }
    }

    fn enter(&mut self) -> Turn {
        let index = self.index;
        let failed = |what: String| Turn::End(GuestExit::Error(format!("vCPU {index}: {what}")));
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => self.bus.read_port(port, data),
            Ok(VcpuExit::IoOut(port, data)) => {
                if let Some(exit) = self.bus.write_port(port, data) {
                    return Turn::End(exit);
                }
            }
            Ok(VcpuExit::MmioRead(address, data)) => self.bus.read_memory(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => self.bus.write_memory(address, data),
            Ok(VcpuExit::Intr) => return Turn::Interrupted,
            Ok(VcpuExit::Shutdown) => {
                return Turn::End(GuestExit::Crash(format!("triple fault on vCPU {index}")));
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return failed(format!("the CPU refused to enter the guest: {reason:#x} on {cpu}"));
            }
            Ok(VcpuExit::InternalError) => return failed(self.internal_error()),
            Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                return failed(format!("guest memory at {gpa:#x} failed"));
            }
            Ok(other) => return failed(format!("unexpected exit {other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Turn::Interrupted;
            }
            Err(error) => return failed(format!("KVM_RUN: {error}")),
        }
        Turn::Go
    }

    fn internal_error(&mut self) -> String {
        let registers = self.fd.get_regs().map(|r| r.rip).unwrap_or_default();
        // SAFETY: the exit's reason says that this field of the union is the valid one.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        format!("KVM could not emulate the guest at {registers:#x} (internal error {suberror})")
    }
}
