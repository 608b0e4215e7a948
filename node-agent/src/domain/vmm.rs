//! The link to a domain's VMM: its process, followed by pidfd, and its API, followed by the
//! stream of its status. Either may come first: after the agent's own restart both are found
//! again, a process that is still starting has no API yet, and one that hangs has lost it.

use std::future::pending;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};

use drover_hv::config::DomainConfig;
use drover_proto::vmm::v1::{VmmState, VmmStatus};
use tonic::Streaming;

use super::client::{self, VmmClient};
use super::{Domain, files};
use crate::decide::{Migration, Vmm};
use crate::error::{Error, blocking};
use crate::process::{Process, try_lock};
use crate::records::{DomainFiles, DomainRecord, Run};

/// What is known of the VMM now.
#[derive(Debug)]
pub(super) struct Link {
    seen: Vmm,
    process: Option<Followed>,
    api: Option<Api>,
    /// How the process ended, when it was a child of this agent.
    pub(super) exit_status: Option<ExitStatus>,
}

#[derive(Debug)]
struct Followed {
    process: Process,
    child: Option<Child>,
}

#[derive(Debug)]
struct Api {
    client: VmmClient,
    stream: Streaming<VmmStatus>,
    status: VmmStatus,
}

/// What has happened to a VMM.
#[derive(Debug)]
pub(super) enum Event {
    /// It has something new to say.
    Status(Box<VmmStatus>),
    /// Its API is gone.
    Lost,
    /// Its process is gone.
    Ended,
}

impl Link {
    pub(super) fn gone() -> Self {
        Self { seen: Vmm::Gone, process: None, api: None, exit_status: None }
    }

    /// As decisions see it.
    pub(super) fn seen(&self) -> &Vmm {
        &self.seen
    }

    pub(super) fn is_gone(&self) -> bool {
        self.seen == Vmm::Gone
    }

    pub(super) fn is_silent(&self) -> bool {
        matches!(self.seen, Vmm::Silent { .. })
    }

    pub(super) fn has_exited(&self) -> bool {
        matches!(self.seen, Vmm::Live { state: VmmState::Exited, .. })
    }

    pub(super) fn status(&self) -> Option<&VmmStatus> {
        self.api.as_ref().map(|api| &api.status)
    }

    pub(super) fn client(&self) -> Option<VmmClient> {
        self.api.as_ref().map(|api| api.client.clone())
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(|followed| followed.process.pid())
    }

    /// What happens next to the VMM; for ever, if there is none. May be dropped and called again.
    pub(super) async fn event(&mut self) -> Event {
        let Self { process, api, .. } = self;
        let ended = async {
            match process {
                Some(followed) => followed.process.ended().await,
                None => pending().await,
            }
        };
        let said = async {
            match api {
                Some(api) => api.stream.message().await,
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            () = ended => Event::Ended,
            message = said => match message {
                Ok(Some(status)) => Event::Status(Box::new(status)),
                Ok(None) | Err(_) => Event::Lost,
            },
        }
    }

    pub(super) fn take(&mut self, event: Event, now_ms: u64) {
        match event {
            Event::Status(status) => self.set_status(*status),
            Event::Lost => {
                self.api = None;
                let handed_to = self.seen.handed_to();
                self.seen = Vmm::Silent { since_ms: now_ms, handed_to };
            }
            Event::Ended => {
                let child = self.process.take().and_then(|followed| followed.child);
                // The pidfd has said that it ended: this does not wait.
                self.exit_status = child.and_then(|mut child| child.wait().ok());
                self.api = None;
                self.seen = Vmm::Gone;
            }
        }
    }

    pub(super) fn set_status(&mut self, status: VmmStatus) {
        let Some(api) = &mut self.api else { return };
        if is_older(&status, &api.status) {
            return;
        }
        let migration = status.migration.as_ref().map(|migration| Migration {
            id: migration.id.clone(),
            role: migration.role(),
            progress: migration.progress(),
        });
        let handed_to = match status.state() {
            VmmState::HandedOver | VmmState::Exited => self.seen.handed_to(),
            _ => 0,
        };
        self.seen = Vmm::Live { state: status.state(), migration, handed_to };
        api.status = status;
    }

    pub(super) fn set_handed_to(&mut self, epoch: u64) {
        if let Vmm::Live { handed_to, .. } | Vmm::Silent { handed_to, .. } = &mut self.seen {
            *handed_to = epoch;
        }
    }

    pub(super) fn kill(&self) -> Result<(), Error> {
        let Some(followed) = &self.process else {
            return Err(Error::Domain("the VMM's process is not found yet".into()));
        };
        followed.process.kill().map_err(|source| Error::Process { action: "kill it", source })
    }
}

/// The answer to a call and the stream may overtake each other. 0 is an old VMM, which does not
/// count.
fn is_older(status: &VmmStatus, than: &VmmStatus) -> bool {
    status.sequence != 0 && status.sequence < than.sequence
}

/// In words, for an end without a word from the VMM itself.
pub(super) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("the VMM ended with code {code}"),
        (None, Some(signal)) => format!("the VMM was killed by signal {signal}"),
        (None, None) => "the VMM ended".into(),
    }
}

impl Domain {
    /// After the agent's start: what is on disk, and is there a VMM?
    pub(super) async fn look_first(&mut self) {
        let files = self.files.clone();
        let load = move || {
            let handover = files::read_handover(&files.handover).unwrap_or_default();
            Ok((DomainRecord::load(&files), handover))
        };
        match blocking(load).await {
            Ok((Ok(record), _)) => self.record = record,
            Ok((Err(error), handover)) => {
                tracing::error!(uid = self.uid, %error, "the domain's record cannot be used");
                let text = format!("{error}; delete the domain to clear it");
                self.record_damage = Some((text, handover));
            }
            Err(error) => self.record_damage = Some((error.to_string(), None)),
        }
        self.progress.ended_ms = self.now_ms();
        self.look_again().await;
        self.learn().await;
        self.publish();
    }

    /// Looks for the process and its API, as far as they are not known.
    pub(super) async fn look_again(&mut self) {
        if self.link.process.is_none() {
            let files = self.files.clone();
            match blocking(move || find_process(&files)).await {
                Ok(Found::Nobody) => {
                    if !self.link.is_gone() {
                        self.link = Link::gone();
                    }
                    return;
                }
                Ok(Found::Process(process)) => {
                    self.link.process = Some(Followed { process, child: None });
                }
                Ok(Found::Unknown) => {}
                Err(error) => {
                    tracing::warn!(uid = self.uid, %error, "cannot look for the VMM");
                }
            }
            if !self.link.is_silent() {
                self.link.seen = Vmm::Silent { since_ms: self.now_ms(), handed_to: 0 };
            }
        }
        if self.call_up().await.is_err() {
            self.read_handover().await;
        }
    }

    /// The hand-over of the VMM that is there, as it stands on disk.
    async fn read_handover(&mut self) {
        let path = self.files.handover.clone();
        let run_epoch = self.record.as_ref().and_then(|r| r.run.as_ref()).map_or(0, |r| r.epoch);
        match blocking(move || files::read_handover(&path)).await {
            Ok(Some(handover)) if handover.to_epoch > run_epoch => {
                self.link.set_handed_to(handover.to_epoch);
            }
            Ok(_) => {}
            Err(error) => {
                // Not known to whom: then only a decision by hand can bring it back.
                tracing::error!(uid = self.uid, %error, "the hand-over cannot be read");
                self.link.set_handed_to(u64::MAX);
            }
        }
    }

    /// Connects to the API of a process that is there.
    pub(super) async fn call_up(&mut self) -> Result<(), Error> {
        let mut client = client::connect(&self.files.socket).await?;
        let status = client.status().await?;
        if status.domain_uid != self.uid {
            return Err(Error::Domain(format!(
                "the VMM on {} runs domain {}",
                self.files.socket.display(),
                status.domain_uid
            )));
        }
        let stream = client.watch().await?;
        self.link.api = Some(Api { client, stream, status: status.clone() });
        self.link.set_status(status);
        self.live_since.get_or_insert_with(tokio::time::Instant::now);
        Ok(())
    }

    /// Writes down what the VMM's status says for the first time.
    pub(super) async fn learn(&mut self) {
        let Some(status) = self.link.status() else { return };
        let (pid, epoch, state) = (self.link.pid(), status.epoch, status.state());
        let runs = matches!(state, VmmState::Running | VmmState::Paused);
        let known = self.record.clone();
        let mut record = known.clone().unwrap_or_else(|| DomainRecord {
            uid: self.uid.clone(),
            // The record is lost, and the VMM knows what was in it.
            name: self.wanted.assigned().map(|a| a.name.clone()).unwrap_or_default(),
            ..DomainRecord::default()
        });
        let run = record
            .run
            .get_or_insert_with(|| Run { boot_id: self.shared.boot_id.clone(), ..Run::default() });
        run.pid = pid.or(run.pid);
        // A paused source in its switch-over has run; a paused destination never has.
        run.ran |= runs;
        let restored = run.restore.clone().filter(|_| run.ran);
        run.epoch = run.epoch.max(epoch);
        record.epoch = record.epoch.max(run.epoch);
        // What the guest went on from is used up.
        record.restored = restored.or(record.restored);
        if known.as_ref() != Some(&record) {
            match self.save(record).await {
                Ok(()) => self.record_damage = None,
                Err(error) => {
                    tracing::warn!(uid = self.uid, %error, "cannot write the domain's record");
                }
            }
        }
        if state == VmmState::HandedOver {
            self.read_handover().await;
        }
    }

    /// Starts the process. The lock is its standard input, so that it is known by it.
    pub(super) async fn spawn(
        &mut self,
        config: DomainConfig,
        incoming: bool,
    ) -> Result<(), Error> {
        let files = self.files.clone();
        let vmm = self.shared.vmm.clone();
        let followed = blocking(move || spawn_vmm(&vmm, &files, &config, incoming)).await?;
        self.link = Link {
            seen: Vmm::Silent { since_ms: self.now_ms(), handed_to: 0 },
            process: Some(followed),
            api: None,
            exit_status: None,
        };
        self.live_since = None;
        Ok(())
    }
}

enum Found {
    Nobody,
    Process(Process),
    /// Somebody has the lock, and cannot be found yet.
    Unknown,
}

fn find_process(files: &DomainFiles) -> Result<Found, Error> {
    if !files.lock.exists() {
        return Ok(Found::Nobody);
    }
    let held = try_lock(&files.lock).map_err(|err| Error::io("lock", &files.lock, err))?.is_none();
    if !held {
        return Ok(Found::Nobody);
    }
    match Process::find(&files.lock) {
        Ok(Some(process)) => Ok(Found::Process(process)),
        Ok(None) => Ok(Found::Unknown),
        Err(source) => Err(Error::Process { action: "look for it", source }),
    }
}

fn spawn_vmm(
    vmm: &std::path::Path,
    files: &DomainFiles,
    config: &DomainConfig,
    incoming: bool,
) -> Result<Followed, Error> {
    let fail = |action: &'static str| move |source| Error::Process { action, source };
    drover_storage::create_dir(&files.dir)?;
    drover_storage::create_dir(&files.run_dir)?;
    let Some(lock) = try_lock(&files.lock).map_err(|err| Error::io("lock", &files.lock, err))?
    else {
        return Err(Error::Domain("a VMM of this domain exists already".into()));
    };
    // Nobody can be listening on it: the lock was free.
    match std::fs::remove_file(&files.socket) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("remove", &files.socket, err));
        }
        _ => {}
    }
    files::write_config(&files.config, config)?;
    let log = files::open_log(&files.log)?;
    let copy = log.try_clone().map_err(fail("share its log"))?;
    let mut command = Command::new(vmm);
    command.arg("run").arg("--config").arg(&files.config);
    command.arg("--socket").arg(&files.socket).arg("--state-dir").arg(&files.dir);
    if incoming {
        command.arg("--incoming");
    }
    command.stdin(Stdio::from(lock)).stdout(Stdio::from(copy)).stderr(Stdio::from(log));
    command.current_dir("/").env_clear();
    for name in ["PATH", "DROVER_LOG", "DROVER_LOG_FORMAT", "RUST_BACKTRACE"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    // SAFETY: setsid is async-signal-safe and touches no memory of this process.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut child = command.spawn().map_err(|source| Error::Process {
        action: "start --vmm",
        source: std::io::Error::new(source.kind(), format!("{}: {source}", vmm.display())),
    })?;
    match Process::follow(child.id(), &files.lock) {
        Ok(Some(process)) => {
            // The agent may be protected from the kernel's out-of-memory killer; guests are not.
            let adjust = format!("/proc/{}/oom_score_adj", child.id());
            if let Err(err) = std::fs::write(adjust, "0") {
                tracing::debug!(%err, "cannot reset oom_score_adj");
            }
            Ok(Followed { process, child: Some(child) })
        }
        // It ended at once. It is a child until it is waited for, so the pid is still its own.
        Ok(None) => {
            let status = child.wait().map_err(fail("wait for it"))?;
            Err(Error::Domain(files::last_words(files, &describe(status))))
        }
        Err(source) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(Error::Process { action: "follow it", source })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a VMM said before it was called is not taken for news after the answer.
    #[test]
    fn the_later_status_counts() {
        let status = |sequence| VmmStatus { sequence, ..VmmStatus::default() };
        assert!(is_older(&status(4), &status(5)));
        for (new, last) in [(5, 5), (6, 5), (0, 5), (5, 0), (0, 0)] {
            assert!(!is_older(&status(new), &status(last)), "{new} after {last}");
        }
    }
}
