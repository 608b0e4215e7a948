//! `vpsctl domain console`: a terminal, or a pipe, at a domain's serial console.
//!
//! The console outlives its stream: when a domain moves, or the member that carried the stream
//! is gone, it is attached again and what was said before is not repeated.

use std::{
    io::{IsTerminal, Read},
    time::Duration,
};

use drover_proto::v1::{
    ConsoleInput, ConsoleOutput, Domain, DomainState, domain_service_client::DomainServiceClient,
};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{Context, domain::get};
use crate::{
    args::ConsoleArgs,
    error::Error,
    out::{
        human::{enum_name, short, time},
        print_bytes,
    },
    wait::interrupts,
};

/// Ctrl-]
const ESCAPE: u8 = 0x1d;
/// The history is over when nothing has come for this long.
const HISTORY_SILENCE: Duration = Duration::from_secs(1);
const REATTACH_PAUSE: Duration = Duration::from_millis(500);
/// So many streams in a row that carry nothing, and the console is given up.
const REATTACH_MAX: u32 = 60;
const INPUT_CHUNK: usize = 4096;
const QUEUE: usize = 16;

/// Why a stream was left.
enum End {
    /// The user, the end of the input or `--history-only`.
    Wanted,
    /// The other side ended it; whether it had carried anything.
    Closed { carried: bool },
}

pub(super) async fn run(context: &Context, args: ConsoleArgs) -> Result<(), Error> {
    let started = Instant::now();
    let name = args.name.domain.clone();
    let mut session = Session::new(context, args);
    let mut interrupt = interrupts()?;
    tokio::select! {
        end = session.run() => end?,
        // Only where the terminal is not raw; there the key goes to the guest.
        _ = interrupt.recv() => {}
        () = context.cluster.deadline_passed() => {
            return Err(Error::TimeoutFollowing(time(started.elapsed())));
        }
    }
    if session.raw.take().is_some() {
        eprintln!("\nleft the console of {}", short(&name));
    }
    Ok(())
}

struct Session<'a> {
    context: &'a Context,
    name: String,
    history_only: bool,
    /// How long to stay once there is no input any more.
    linger: Duration,
    /// `None` once it has ended, and with `--history-only`.
    input: Option<mpsc::Receiver<Vec<u8>>>,
    raw: Option<RawTerminal>,
    /// The history is shown once.
    attached_before: bool,
}

impl<'a> Session<'a> {
    fn new(context: &'a Context, args: ConsoleArgs) -> Self {
        Self {
            context,
            name: args.name.domain,
            history_only: args.history_only,
            linger: if args.history_only { HISTORY_SILENCE } else { args.linger },
            input: None,
            raw: None,
            attached_before: false,
        }
    }

    async fn run(&mut self) -> Result<(), Error> {
        let mut empty_streams = 0;
        loop {
            let (output, typed) = match self.attach().await {
                Ok(streams) => streams,
                // It may be on its way: between two VMMs, or starting again.
                Err(error)
                    if self.attached_before
                        && empty_streams + 1 < REATTACH_MAX
                        && !self.ended().await? =>
                {
                    tracing::debug!(%error, "no console yet");
                    empty_streams += 1;
                    tokio::time::sleep(REATTACH_PAUSE).await;
                    continue;
                }
                Err(error) => return Err(self.without_console(error).await),
            };
            if !self.attached_before {
                self.take_input()?;
            }
            let end = self.carry(output, typed).await?;
            self.attached_before = true;
            match end {
                End::Wanted => return Ok(()),
                End::Closed { carried: true } => empty_streams = 0,
                End::Closed { carried: false } => empty_streams += 1,
            }
            if self.history_only || self.ended().await? {
                return Ok(());
            }
            if empty_streams >= REATTACH_MAX {
                let id = short(&self.name);
                return Err(Error::Local(format!("the console of {id} ends as soon as it opens")));
            }
            tokio::time::sleep(REATTACH_PAUSE).await;
        }
    }

    /// Why there is none: a domain that does not run has no console.
    async fn without_console(&self, error: Error) -> Error {
        match get(self.context, &self.name).await {
            Ok(domain) if !has_console(&domain) => {
                let (state, id) = (state_and_reason(&domain), short(&self.name));
                Error::Conflict(format!("{id} is {state}; only a running domain has a console"))
            }
            _ => error,
        }
    }

    /// Opens the stream, at whatever member can.
    async fn attach(
        &self,
    ) -> Result<(Streaming<ConsoleOutput>, mpsc::Sender<ConsoleInput>), Error> {
        let open = |rpc| {
            let hello = ConsoleInput { name: self.name.clone(), ..ConsoleInput::default() };
            async move {
                let (sender, typed) = mpsc::channel(QUEUE);
                // The queue is new and has room.
                let _ = sender.try_send(hello);
                let opened = DomainServiceClient::new(rpc)
                    .attach_console(ReceiverStream::new(typed))
                    .await?;
                Ok(opened.map(|output| (output, sender)))
            }
        };
        if self.attached_before {
            self.context.cluster.call_again(open).await
        } else {
            self.context.cluster.call(open).await
        }
    }

    /// From here on keys go to the guest: not before there is a console.
    fn take_input(&mut self) -> Result<(), Error> {
        if self.history_only {
            return Ok(());
        }
        if std::io::stdin().is_terminal() {
            eprintln!("console of {}: Ctrl-] leaves", short(&self.name));
            self.raw = Some(RawTerminal::enter()?);
        }
        self.input = Some(read_stdin()?);
        Ok(())
    }

    /// Carries bytes both ways until one side ends.
    async fn carry(
        &mut self,
        mut output: Streaming<ConsoleOutput>,
        typed: mpsc::Sender<ConsoleInput>,
    ) -> Result<End, Error> {
        let mut carried = false;
        let mut last_heard = Instant::now();
        loop {
            let leave_at = match self.input {
                Some(_) => None,
                None => Some(last_heard + self.linger),
            };
            tokio::select! {
                message = output.message() => match message {
                    Ok(Some(said)) => {
                        if self.history_only && !said.history {
                            return Ok(End::Wanted);
                        }
                        if !(said.history && self.attached_before) {
                            print_bytes(&said.data)?;
                        }
                        carried = true;
                        last_heard = Instant::now();
                    }
                    Ok(None) => return Ok(End::Closed { carried }),
                    Err(status) if self.context.cluster.turn_after(&status) => {
                        return Ok(End::Closed { carried });
                    }
                    Err(status) => return Err(status.into()),
                },
                data = next_input(&mut self.input) => match data {
                    Some(data) => {
                        let escape = self.raw.is_some().then(|| data.iter().position(|b| *b == ESCAPE));
                        let escape = escape.flatten();
                        let data = &data[..escape.unwrap_or(data.len())];
                        let message = ConsoleInput { data: data.to_vec().into(), ..Default::default() };
                        if !data.is_empty() && typed.send(message).await.is_err() {
                            return Ok(End::Closed { carried });
                        }
                        if escape.is_some() {
                            return Ok(End::Wanted);
                        }
                    }
                    None => {
                        self.input = None;
                        last_heard = Instant::now();
                    }
                },
                () = sleep_or_never(leave_at) => return Ok(End::Wanted),
            }
        }
    }

    /// Whether the domain has stopped, which is why its console ended; says so.
    async fn ended(&self) -> Result<bool, Error> {
        let domain = get(self.context, &self.name).await?;
        if has_console(&domain) {
            return Ok(false);
        }
        eprint!("\r\n{} is {}\r\n", short(&self.name), state_and_reason(&domain));
        Ok(true)
    }
}

fn has_console(domain: &Domain) -> bool {
    use DomainState::{Migrating, Running, Starting, Stopping};
    matches!(domain.state(), Running | Migrating | Starting | Stopping)
}

fn state_and_reason(domain: &Domain) -> String {
    let state = enum_name(domain.state().as_str_name(), "DOMAIN_STATE_");
    match domain.state_reason.as_str() {
        "" => state,
        reason => format!("{state}: {reason}"),
    }
}

async fn next_input(input: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match input {
        Some(input) => input.recv().await,
        None => std::future::pending().await,
    }
}

async fn sleep_or_never(until: Option<Instant>) {
    match until {
        Some(until) => sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// Stdin from a thread of its own, which ends with the process: a read of a terminal cannot be
/// called off.
fn read_stdin() -> Result<mpsc::Receiver<Vec<u8>>, Error> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let read = move || {
        let mut chunk = vec![0; INPUT_CHUNK];
        while let Ok(length @ 1..) = std::io::stdin().read(&mut chunk) {
            if sender.blocking_send(chunk[..length].to_vec()).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(read)
        .map_err(|e| Error::Local(format!("cannot read the terminal: {e}")))?;
    Ok(receiver)
}

/// The terminal without echo, lines and signals; as it was when dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Result<Self, Error> {
        let failed = |e| Error::Local(format!("cannot make the terminal raw: {e}"));
        let before = tcgetattr(rustix::stdio::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &raw).map_err(failed)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &self.before);
    }
}
