//! Members as processes: the very binary, killed as a machine would kill it.

use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use drover_proto::agent::v1::session_service_client::SessionServiceClient;
use drover_proto::agent::v1::{AgentMessage, Hello, agent_message};
use drover_proto::v1::cluster_service_client::ClusterServiceClient;
use drover_proto::v1::node_service_client::NodeServiceClient;
use drover_proto::v1::{ClusterStatus, GetStatusRequest, ListNodesRequest, NodeCapacity};
use tokio::time::{sleep, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// One try of a call; a member may hang or be gone.
const TRY_TIME: Duration = Duration::from_secs(5);
/// Between two tries: not a wait for anything, only not a busy loop.
const TRY_INTERVAL: Duration = Duration::from_millis(50);

pub(crate) struct Processes {
    dir: tempfile::TempDir,
    addresses: Vec<String>,
    running: Vec<Option<Child>>,
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in self.running.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Processes {
    pub(crate) fn new(count: usize) -> Self {
        let ports: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let addresses = ports.iter().map(|port| port.local_addr().unwrap().to_string()).collect();
        let running = (0..count).map(|_| None).collect();
        Self { dir: tempfile::tempdir().unwrap(), addresses, running }
    }

    /// The command of member `id` (from 1), with its own port and directory.
    fn command(&self, id: usize) -> Command {
        let data_dir = self.dir.path().join(id.to_string());
        self.command_as(id, &data_dir, &self.addresses[id - 1], "process-test")
    }

    pub(crate) fn command_as(
        &self,
        id: usize,
        data_dir: &Path,
        listen: &str,
        cluster_id: &str,
    ) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drover-controller"));
        command
            .args(["--id", &id.to_string(), "--listen", listen, "--cluster-id", cluster_id])
            .arg("--data-dir")
            .arg(data_dir)
            .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT");
        for (index, address) in self.addresses.iter().enumerate() {
            command.args(["--member", &format!("{}={address}", index + 1)]);
        }
        command
    }

    pub(crate) fn start(&mut self, id: usize) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join(format!("{id}.log")))
            .unwrap();
        let child = self.command(id).stdin(Stdio::null()).stderr(log).spawn().unwrap();
        self.running[id - 1] = Some(child);
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self, id: usize) {
        let mut child = self.running[id - 1].take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM; how it ends.
    pub(crate) async fn terminate(&mut self, id: usize) -> ExitStatus {
        let mut child = self.running[id - 1].take().unwrap();
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let ended = tokio::task::spawn_blocking(move || child.wait().unwrap());
        super::within(ended).await.unwrap()
    }

    /// Runs a command that must end by itself: its code and its last line on stderr.
    pub(crate) async fn ends(mut command: Command) -> (Option<i32>, String) {
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let ended = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            std::io::Read::read_to_string(child.stderr.as_mut().unwrap(), &mut text).unwrap();
            (child.wait().unwrap().code(), text)
        });
        let (code, text) = super::within(ended).await.unwrap();
        (code, text.lines().last().unwrap_or_default().to_owned())
    }

    fn channel(&self, id: usize) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.addresses[id - 1])).unwrap().connect_lazy()
    }

    pub(crate) async fn status(&self, id: usize) -> Result<ClusterStatus, Status> {
        let mut client = ClusterServiceClient::new(self.channel(id));
        Ok(client.get_status(GetStatusRequest {}).await?.into_inner())
    }

    /// Waits until some member knows a leader.
    pub(crate) async fn leader(&self) -> usize {
        super::within(async {
            loop {
                for id in (1..).zip(&self.running).filter(|(_, r)| r.is_some()).map(|(id, _)| id) {
                    if let Ok(Ok(status)) = timeout(TRY_TIME, self.status(id)).await
                        && status.leader_id != 0
                        && self.running[usize::try_from(status.leader_id).unwrap() - 1].is_some()
                    {
                        return usize::try_from(status.leader_id).unwrap();
                    }
                }
                sleep(TRY_INTERVAL).await;
            }
        })
        .await
    }

    /// Registers a node, as its agent would: when this returns, that is acknowledged.
    pub(crate) async fn register(&self, node: &str) {
        super::within(async {
            for id in (1..=self.addresses.len()).cycle() {
                match timeout(TRY_TIME, self.try_register(id, node)).await {
                    Ok(Ok(())) => return,
                    // Not the leader, gone, or not up yet.
                    Ok(Err(status)) => assert_ne!(status.code(), Code::InvalidArgument, "{status}"),
                    Err(_) => {}
                }
                sleep(TRY_INTERVAL).await;
            }
        })
        .await;
    }

    async fn try_register(&self, id: usize, node: &str) -> Result<(), Status> {
        let hello = Hello {
            cluster_id: "process-test".into(),
            node: format!("nodes/{node}"),
            // The same at every try, as from the node's disk.
            node_uid: format!(
                "00000000-0000-4000-8000-{:0>12}",
                node.replace(|c: char| !c.is_ascii_digit(), "")
            ),
            boot_id: "boot".into(),
            address: "127.0.0.1:9".into(),
            capacity: Some(NodeCapacity { vcpus: 4, memory_bytes: 1 << 30 }),
            agent_version: "test".into(),
            kernel_version: "test".into(),
        };
        let message = AgentMessage { message: Some(agent_message::Message::Hello(hello)) };
        let mut client = SessionServiceClient::new(self.channel(id));
        let mut answers = client.open_session(tokio_stream::once(message)).await?.into_inner();
        // Welcome: it is written down.
        answers.message().await?.map(drop).ok_or_else(|| Status::unavailable("no welcome"))
    }

    /// The nodes as a member lists them.
    pub(crate) async fn nodes(&self, id: usize) -> Vec<String> {
        super::within(async {
            loop {
                let mut client = NodeServiceClient::new(self.channel(id));
                let request = ListNodesRequest { page_size: 1000, ..ListNodesRequest::default() };
                match timeout(TRY_TIME, client.list_nodes(request)).await {
                    Ok(Ok(answer)) => {
                        let nodes = answer.into_inner().nodes;
                        return nodes.into_iter().map(|node| node.name).collect();
                    }
                    Ok(Err(_)) | Err(_) => sleep(TRY_INTERVAL).await,
                }
            }
        })
        .await
    }
}
