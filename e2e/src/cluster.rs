//! Drover itself in a lab: three controllers in the namespace, an agent on each host.
//!
//! Everything is the real program with its real flags, and is killed by its process number.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::process::{Process, start_detached, wait_for};
use crate::ssh::quote;
use crate::vpsctl::Vpsctl;
use crate::{Error, Lab, Result, paths};

/// Members of the Raft group.
pub const CONTROLLERS: [u64; 3] = [1, 2, 3];
const PORT: u16 = 7400;
/// Names the cluster; agents of another are refused.
pub const CLUSTER_ID: &str = "lab";
const START_PATIENCE: Duration = Duration::from_secs(120);

/// A cluster that runs in a lab.
#[derive(Debug)]
pub struct Cluster {
    lab: Lab,
    controllers: [Option<Process>; 3],
}

/// `host:port` of a controller's API.
pub fn controller_address(id: u64) -> String {
    format!("10.77.0.{}:{PORT}", 10 + id)
}

/// All controllers, as `vpsctl --server` takes them.
pub fn servers() -> String {
    CONTROLLERS.map(controller_address).join(",")
}

impl Cluster {
    /// Starts controllers and agents, and waits until every node is ready. A core is promised to
    /// `overcommit` vCPUs.
    pub fn start(lab: &Lab, overcommit: u32, mut progress: impl FnMut(&str)) -> Result<Self> {
        let mut cluster = Self { lab: lab.clone(), controllers: [None; 3] };
        for id in CONTROLLERS {
            cluster.start_controller(id)?;
        }
        let leader = cluster.wait_leader(START_PATIENCE)?;
        progress(&format!("controllers 1, 2 and 3 run; {leader} leads"));
        let hosts = lab.hosts()?;
        std::thread::scope(|scope| {
            let starting: Vec<_> = hosts
                .iter()
                .map(|host| scope.spawn(|| cluster.install_agent(host, overcommit)))
                .collect();
            starting.into_iter().try_for_each(|thread| {
                thread.join().unwrap_or_else(|_| Err(Error::other("a thread panicked")))
            })
        })?;
        cluster.wait_nodes_ready(hosts.len(), START_PATIENCE)?;
        progress(&format!("agents run; nodes {} are ready", hosts.join(", ")));
        Ok(cluster)
    }

    /// The lab it runs in.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The command line, with every controller as its server.
    pub fn vpsctl(&self) -> Vpsctl {
        Vpsctl::new(self.lab.netns(), servers())
    }

    fn data_dir(&self, id: u64) -> PathBuf {
        paths::disk_dir(self.lab.name()).join(format!("controller{id}"))
    }

    /// Where a controller's log is.
    pub fn controller_log(&self, id: u64) -> PathBuf {
        paths::run_dir(self.lab.name()).join(format!("controller{id}.log"))
    }

    /// The command line of a controller, with this data folder.
    pub fn controller_command(&self, id: u64, data_dir: &std::path::Path) -> Result<Command> {
        let address = controller_address(id);
        let mut command = self.lab.netns().command(paths::program("drover-controller"))?;
        command.arg("--id").arg(id.to_string()).arg("--data-dir").arg(data_dir).args([
            "--listen",
            &address,
            "--advertise",
            &address,
            "--cluster-id",
            CLUSTER_ID,
        ]);
        for member in CONTROLLERS {
            command.args(["--member", &format!("{member}={}", controller_address(member))]);
        }
        Ok(command)
    }

    /// Starts a controller, with the data that it had.
    pub fn start_controller(&mut self, id: u64) -> Result<()> {
        let data_dir = self.data_dir(id);
        fs::create_dir_all(&data_dir).map_err(Error::io("cannot create", &data_dir))?;
        let command = self.controller_command(id, &data_dir)?;
        let process = start_detached(command, &self.controller_log(id))?;
        *self.slot(id)? = Some(process);
        Ok(())
    }

    /// SIGKILL for a controller.
    pub fn kill_controller(&mut self, id: u64) -> Result<()> {
        match self.slot(id)?.take() {
            Some(process) => process.kill(),
            None => Err(Error::other(format!("controller {id} does not run"))),
        }
    }

    /// Whether a controller's process lives.
    pub fn controller_runs(&mut self, id: u64) -> Result<bool> {
        Ok(self.slot(id)?.is_some_and(|p| p.is_alive()))
    }

    fn slot(&mut self, id: u64) -> Result<&mut Option<Process>> {
        usize::try_from(id)
            .ok()
            .and_then(|id| self.controllers.get_mut(id.checked_sub(1)?))
            .ok_or_else(|| Error::other(format!("controller {id}: there are 1, 2 and 3")))
    }

    /// The leader that a majority agrees on, once there is one.
    pub fn wait_leader(&self, patience: Duration) -> Result<u64> {
        wait_for("a leading controller", patience, || {
            let status = self.vpsctl().json(&["cluster", "status"]);
            Ok(status.ok().and_then(|s| s["leader_id"].as_u64()).filter(|id| *id != 0))
        })
        .map_err(|e| self.with_logs(e))
    }

    /// Waits until so many nodes are ready.
    pub fn wait_nodes_ready(&self, count: usize, patience: Duration) -> Result<()> {
        wait_for(&format!("readiness of {count} nodes"), patience, || {
            let Ok(nodes) = self.vpsctl().json(&["node", "list"]) else { return Ok(None) };
            let ready = list(&nodes).filter(|n| n["state"] == "ready").count();
            Ok((ready >= count).then_some(()))
        })
        .map_err(|e| self.with_logs(e))
    }

    /// The last lines of the controllers' logs, for an error that needs them.
    fn with_logs(&self, error: Error) -> Error {
        let tail = |id: u64| {
            let text = fs::read_to_string(self.controller_log(id)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().rev().take(5).collect();
            let tail: Vec<&str> = lines.into_iter().rev().collect();
            format!("controller {id}:\n{}", tail.join("\n"))
        };
        Error::other(format!("{error}\n{}", CONTROLLERS.map(tail).join("\n")))
    }

    /// Installs the agent on a host, as a provider would: its unit, its settings, started at boot.
    fn install_agent(&self, host: &str, overcommit: u32) -> Result<()> {
        let unit_path = paths::source_dir()?.join("node-agent/drover-agent.service");
        let unit = fs::read(&unit_path).map_err(Error::io("cannot read", &unit_path))?;
        let ssh = self.lab.ssh(host)?;
        let settings = format!(
            "DROVER_NODE={host}\nDROVER_CLUSTER_ID={CLUSTER_ID}\nDROVER_CONTROLLERS={}\n\
             DROVER_MIGRATION_ADDRESS={}\nDROVER_VCPU_OVERCOMMIT={overcommit}\n\
             DROVER_POOLS={}=lvm:drover/thin\n",
            servers(),
            ssh.address,
            crate::vps::POOL
        );
        let script = format!(
            "set -e; mkdir -p /etc/drover; printf %s {} > /etc/drover/agent.env; \
             cat > /etc/systemd/system/drover-agent.service; \
             systemctl enable --quiet --now drover-agent",
            quote(&settings)
        );
        let output = ssh.run_with_input(&script, &unit)?;
        if output.status.success() {
            return Ok(());
        }
        Err(Error::other(format!(
            "{host}: the agent did not start: {}",
            String::from_utf8_lossy(&output.stderr).trim_end()
        )))
    }

    /// SIGKILL for a host's agent alone; its VMMs are other processes. systemd starts it again
    /// a second later.
    pub fn kill_agent(&self, host: &str) -> Result<()> {
        self.lab
            .ssh(host)?
            .run("systemctl kill --kill-whom=main --signal=KILL drover-agent")
            .map(|_| ())
    }

    /// Waits until a host's agent runs, another process than `before` when that is given.
    pub fn wait_agent(&self, host: &str, before: Option<u32>) -> Result<u32> {
        wait_for(&format!("the agent of {host}"), START_PATIENCE, || {
            let pid = self.agent_pid(host)?;
            Ok(pid.filter(|pid| Some(*pid) != before))
        })
    }

    /// The process of a host's agent.
    pub fn agent_pid(&self, host: &str) -> Result<Option<u32>> {
        let pid = self.lab.ssh(host)?.run("systemctl show -P MainPID drover-agent")?;
        Ok(pid.trim().parse().ok().filter(|pid| *pid != 0))
    }

    /// What a host's agent has logged.
    pub fn agent_log(&self, host: &str) -> Result<String> {
        self.lab.ssh(host)?.run("journalctl -u drover-agent --no-pager -o cat")
    }

    /// The process numbers of the VMMs on a host.
    pub fn vmm_pids(&self, host: &str) -> Result<Vec<u32>> {
        let list = self.lab.ssh(host)?.run("pgrep -x drover-vmm || true")?;
        let mut pids: Vec<u32> = list.split_whitespace().filter_map(|p| p.parse().ok()).collect();
        pids.sort_unstable();
        Ok(pids)
    }

    /// A domain, as the API shows it.
    pub fn domain(&self, name: &str) -> Result<DomainView> {
        let value = self.vpsctl().json(&["domain", "show", name])?;
        serde_json::from_value(value).map_err(|e| Error::other(format!("domain {name}: {e}")))
    }

    /// All domains.
    pub fn domains(&self) -> Result<Vec<DomainView>> {
        let value = self.vpsctl().json(&["domain", "list"])?;
        serde_json::from_value(value).map_err(|e| Error::other(format!("domain list: {e}")))
    }

    /// Waits until an operation is done; how it ended.
    pub fn wait_operation(&self, name: &str, patience: Duration) -> Result<Value> {
        wait_for(&format!("the end of {name}"), patience, || {
            // A leader may be missing for a moment.
            let Ok(operation) = self.vpsctl().json(&["operation", "show", name]) else {
                return Ok(None);
            };
            let done =
                matches!(operation["state"].as_str(), Some("succeeded" | "failed" | "cancelled"));
            Ok(done.then_some(operation))
        })
    }
}

/// What of a domain matters here.
#[derive(Debug, Clone, Deserialize)]
pub struct DomainView {
    /// `domains/web1`.
    pub name: String,
    /// "running" and so on.
    pub state: Option<String>,
    /// Why.
    pub state_reason: String,
    /// `nodes/host1`, or empty.
    pub node: String,
    /// Its owner's number.
    pub epoch: u64,
}

impl DomainView {
    /// The node's bare name.
    pub fn host(&self) -> &str {
        self.node.strip_prefix("nodes/").unwrap_or(&self.node)
    }

    /// Whether the API says that it runs.
    pub fn is_running(&self) -> bool {
        self.state.as_deref() == Some("running")
    }
}

/// The items of a JSON array.
pub fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}
