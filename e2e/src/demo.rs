//! The main job, told step by step: a node is drained under load while things are killed, and
//! nobody notices. Real programs, real kills; the verdict comes from what clients saw.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::{Seen, Watch};
use crate::cluster::{CONTROLLERS, Cluster, list, servers};
use crate::lab::LabOptions;
use crate::process::wait_for;
use crate::vps::{self, BOOT_PATIENCE, Vps};
use crate::{Error, Lab, Result, paths, website};

/// Longest time without an answer that passes. Emulated time is slow.
const GAP_MAX: Duration = Duration::from_secs(2);
const DOMAIN_PATIENCE: Duration = Duration::from_secs(240);
const DRAIN_PATIENCE: Duration = Duration::from_secs(180);
/// The node that is drained.
const FIRST: &str = "host1";
/// The node whose agent is killed.
const SECOND: &str = "host2";
/// vCPUs that a host's one core is promised to.
const OVERCOMMIT: u32 = 3;
/// Where each of the domains begins: on a host of its own, as two that boot on one emulated core
/// take three times as long. The third host is there to be moved to.
const LAYOUT: [&str; 2] = [FIRST, SECOND];

/// One row of the table at the end.
struct Row {
    domain: String,
    from: String,
    to: String,
    total_us: u64,
    pause_us: u64,
}

/// Prints each step with the time since the beginning.
struct Narrator {
    begin: Instant,
}

impl Narrator {
    fn say(&self, text: &str) {
        let seconds = self.begin.elapsed().as_secs_f64();
        for (n, line) in text.lines().enumerate() {
            if n == 0 {
                println!("[{seconds:6.1} s] {line}")
            } else {
                println!("           {line}")
            }
        }
    }
}

/// Runs it; an error when a customer would have noticed. With `keep` the lab is left running.
pub fn run(name: &str, keep: bool) -> Result<()> {
    let narrator = Narrator { begin: Instant::now() };
    narrator.say("starting three hosts (Debian 13 in QEMU, each with its own kernel and KVM)");
    let options = LabOptions { name: name.to_owned(), ..LabOptions::default() };
    let lab = Lab::up(&options, |line| narrator.say(line))?;
    let result = story(&lab, &narrator);
    if result.is_err() {
        let folder = paths::cache_dir().join("logs").join(name);
        match lab.save_logs(&folder) {
            Ok(()) => narrator.say(&format!("logs are in {}", folder.display())),
            Err(error) => narrator.say(&format!("the logs could not be kept: {error}")),
        }
    }
    if keep {
        print_what_to_try(name);
    } else {
        lab.down()?;
    }
    result
}

fn story(lab: &Lab, narrator: &Narrator) -> Result<()> {
    narrator.say("starting three controllers and three agents");
    let mut cluster = Cluster::start(lab, OVERCOMMIT, |line| narrator.say(line))?;
    vps::prepare(&cluster, FIRST, |line| narrator.say(line))?;
    let sites = create_sites(&cluster, narrator)?;

    let targets: Vec<_> = sites.iter().map(|s| (s.vps.name.clone(), s.address)).collect();
    let watch = Watch::start(&lab.netns(), &targets)?;
    watch.wait_all_answer(BOOT_PATIENCE)?;
    narrator.say("all of them answer pings (each 50 ms) and pages (each second)");
    watch.wait_calm(DOMAIN_PATIENCE)?;
    narrator.say("they are done with their first boots; from now on it counts");

    let mut rows = drain_and_kill_the_leader(&mut cluster, narrator)?;
    rows.push(kill_an_agent(&cluster, narrator)?);

    // What comes late should be seen too.
    std::thread::sleep(Duration::from_secs(2));
    let seen = watch.stop()?;
    print_table(&sites, &rows, &seen);
    let faults = faults(&cluster, &sites, &rows, &seen)?;
    if faults.is_empty() {
        narrator.say("nobody noticed: no gap over 2 s, no page over 5 s, no counter went back, no guest rebooted, none ran twice");
        return Ok(());
    }
    Err(Error::other(format!("customers would have noticed:\n  {}", faults.join("\n  "))))
}

/// A customer's website, and what the network knows it by.
struct Site {
    vps: Vps,
    address: Ipv4Addr,
    mac: String,
}

fn create_sites(cluster: &Cluster, narrator: &Narrator) -> Result<Vec<Site>> {
    let vpsctl = cluster.vpsctl();
    let user_data = website::user_data(cluster.lab().name())?;
    let begin = |(number, node): (usize, &&str)| {
        let mut vps = Vps::new(cluster, &format!("web{}", number + 1));
        vps.user_data = Some(user_data.clone());
        let operation = vps.create(&vpsctl, Some(node))?;
        Ok((vps, operation))
    };
    let begun: Vec<(Vps, String)> = LAYOUT.iter().enumerate().map(begin).collect::<Result<_>>()?;
    let mut sites = Vec::new();
    for (vps, operation) in begun {
        succeeded(&cluster.wait_operation(&operation, DOMAIN_PATIENCE)?)
            .map_err(|e| Error::other(format!("{}: {e}", vps.name)))?;
        let (address, mac) = (vps.address(&vpsctl)?, vps.mac(&vpsctl)?);
        sites.push(Site { vps, address, mac });
    }
    narrator.say(&format!(
        "{} VPSes boot from their disks: each Debian's own kernel, on our hypervisor\n{}",
        sites.len(),
        vpsctl.run(&["domain", "list"])?
    ));
    Ok(sites)
}

/// An operation that ended well, or its error.
fn succeeded(operation: &Value) -> Result<()> {
    if operation["state"] == "succeeded" {
        return Ok(());
    }
    Err(Error::other(format!(
        "{} {}: {}",
        operation["name"].as_str().unwrap_or("?"),
        operation["state"].as_str().unwrap_or("?"),
        operation["error"]["message"].as_str().unwrap_or("no reason given")
    )))
}

fn drain_and_kill_the_leader(cluster: &mut Cluster, narrator: &Narrator) -> Result<Vec<Row>> {
    let vpsctl = cluster.vpsctl();
    let plan = vpsctl.run(&["node", "drain", FIRST, "--dry-run"])?;
    narrator.say(&format!("vpsctl node drain {FIRST} --dry-run\n{plan}"));
    let leader = cluster.wait_leader(Duration::from_secs(20))?;
    let drain = vpsctl.start(&["node", "drain", FIRST])?;
    narrator.say(&format!("vpsctl node drain {FIRST}: {drain}"));

    wait_for("the middle of the drain", DRAIN_PATIENCE, || {
        let operation = vpsctl.json(&["operation", "show", &drain])?;
        if !matches!(operation["state"].as_str(), Some("pending" | "running")) {
            return Err(Error::other(format!("the drain ended before its middle: {operation}")));
        }
        let Some(migration) = operation["moves"][0]["operation"].as_str().filter(|m| !m.is_empty())
        else {
            return Ok(None);
        };
        let migration = vpsctl.json(&["operation", "show", migration])?;
        Ok((migration["migration"]["disk_bytes_sent"].as_u64() > Some(0)).then_some(()))
    })?;
    cluster.kill_controller(leader)?;
    let killed = Instant::now();
    narrator.say(&format!("with a disk on its way: kill -9 of controller {leader}, which leads"));
    let next = wait_for("another leader", Duration::from_secs(60), || {
        Ok(cluster.wait_leader(Duration::from_secs(60)).ok().filter(|id| *id != leader))
    })?;
    narrator.say(&format!(
        "controller {next} leads after {:.1} s and goes on with the drain",
        killed.elapsed().as_secs_f64()
    ));

    let operation = cluster.wait_operation(&drain, DRAIN_PATIENCE)?;
    succeeded(&operation)?;
    let rows: Vec<Row> = list(&operation["moves"]).map(Row::of_move).collect();
    if rows.len() != LAYOUT.iter().filter(|host| **host == FIRST).count() {
        return Err(Error::other(format!("the drain moved {} domains: {operation}", rows.len())));
    }
    let left = cluster.vmm_pids(FIRST)?.len();
    if left > 0 {
        return Err(Error::other(format!("{FIRST} still has {left} VMMs after its drain")));
    }
    narrator.say(&format!(
        "{FIRST} is drained: {} moved with its disk, no VMM is left there; {} leaders worked on it",
        rows.len(),
        1 + operation["resumed_count"].as_u64().unwrap_or(0)
    ));
    cluster.start_controller(leader)?;
    narrator.say(&format!("controller {leader} is started again"));
    vpsctl.run(&["node", "uncordon", FIRST])?;
    narrator.say(&format!("vpsctl node uncordon {FIRST}: it takes domains again"));
    Ok(rows)
}

/// Kills an agent, sees that its VMMs live, starts it again, and lets it move one of them.
fn kill_an_agent(cluster: &Cluster, narrator: &Narrator) -> Result<Row> {
    let before = cluster.vmm_pids(SECOND)?;
    let agent = cluster.agent_pid(SECOND)?;
    cluster.kill_agent(SECOND)?;
    narrator
        .say(&format!("kill -9 of the agent on {SECOND}, which has {} domain(s)", before.len()));
    cluster.wait_agent(SECOND, agent)?;
    let after = cluster.vmm_pids(SECOND)?;
    if before != after || before.is_empty() {
        return Err(Error::other(format!(
            "the VMMs on {SECOND} were {before:?} before its agent was killed and {after:?} after"
        )));
    }
    let domain = cluster
        .domains()?
        .into_iter()
        .filter(|d| d.host() == SECOND)
        .max_by(|a, b| a.name.cmp(&b.name))
        .ok_or_else(|| Error::other(format!("no domain is on {SECOND}")))?;
    // The agent is back when it moves what it has found again.
    let vpsctl = cluster.vpsctl();
    let name = domain.name.trim_start_matches("domains/").to_owned();
    let migration = wait_for("a migration by the agent that came back", DRAIN_PATIENCE, || {
        Ok(vpsctl.start(&["domain", "migrate", &name]).ok())
    })?;
    let operation = cluster.wait_operation(&migration, DRAIN_PATIENCE)?;
    succeeded(&operation)?;
    let row = Row::of_migration(&name, &operation["migration"]);
    narrator.say(&format!(
        "the agent is back, has found its VMMs (the same processes), and has moved {name} to {}",
        row.to
    ));
    Ok(row)
}

impl Row {
    fn of_move(value: &Value) -> Self {
        Self {
            domain: bare(&value["domain"]),
            from: bare(&value["from_node"]),
            to: bare(&value["to_node"]),
            total_us: value["total_us"].as_u64().unwrap_or(0),
            pause_us: value["pause_us"].as_u64().unwrap_or(0),
        }
    }

    fn of_migration(domain: &str, report: &Value) -> Self {
        Self {
            domain: domain.to_owned(),
            from: bare(&report["from_node"]),
            to: bare(&report["to_node"]),
            total_us: report["total_us"].as_u64().unwrap_or(0),
            pause_us: report["pause_us"].as_u64().unwrap_or(0),
        }
    }
}

/// The last part of a resource's name.
fn bare(name: &Value) -> String {
    let name = name.as_str().unwrap_or_default();
    name.rsplit('/').next().unwrap_or_default().to_owned()
}

fn print_table(sites: &[Site], rows: &[Row], seen: &[Seen]) {
    let header =
        ["domain", "from", "to", "total", "pause", "longest gap", "slowest page", "counter"];
    let mut table = vec![header.map(str::to_owned)];
    for (site, seen) in sites.iter().zip(seen) {
        let row = rows.iter().find(|r| r.domain == site.vps.name);
        let cell = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        let pages = &seen.pages;
        let intact = pages.went_back == 0 && pages.reboots == 0 && pages.last.is_some();
        table.push([
            site.vps.name.clone(),
            cell(row.map(|r| r.from.clone())),
            cell(row.map(|r| r.to.clone())),
            cell(row.map(|r| format!("{:.2} s", r.total_us as f64 / 1e6))),
            cell(row.map(|r| format!("{:.0} ms", r.pause_us as f64 / 1e3))),
            format!("{:.0} ms", seen.pings.longest_gap().as_secs_f64() * 1e3),
            format!("{:.0} ms", pages.slowest.as_secs_f64() * 1e3),
            format!(
                "{} {}",
                pages.last.as_ref().map_or(0, |p| p.counter),
                if intact { "intact" } else { "BROKEN" }
            ),
        ]);
    }
    println!();
    for line in &table {
        for (column, cell) in line.iter().enumerate() {
            let width = table.iter().map(|l| l[column].len()).max().unwrap_or(0) + 2;
            print!("{cell:<width$}");
        }
        println!();
    }
    println!();
}

fn faults(cluster: &Cluster, sites: &[Site], rows: &[Row], seen: &[Seen]) -> Result<Vec<String>> {
    let mut faults: Vec<String> = seen.iter().flat_map(|s| s.faults(GAP_MAX)).collect();
    let netns = cluster.lab().netns();
    for (site, first) in sites.iter().zip(LAYOUT) {
        let mut expected = vec![first.to_owned()];
        expected.extend(rows.iter().filter(|r| r.domain == site.vps.name).map(|r| r.to.clone()));
        if let Err(error) = netns.run(|| website::check(&site.vps.name, site.address)) {
            faults.push(error.to_string());
        }
        // Its frames tell where it ran; a host that comes twice ran it beside another.
        let ran_on = cluster.lab().hosts_of_address(&site.mac)?;
        if ran_on != expected {
            faults.push(format!(
                "{}: its frames came from {}, and it was moved along {}",
                site.vps.name,
                ran_on.join(", "),
                expected.join(", ")
            ));
        }
    }
    let mut vmms = 0;
    for host in cluster.lab().hosts()? {
        vmms += cluster.vmm_pids(&host)?.len();
    }
    if vmms != sites.len() {
        faults.push(format!("{vmms} VMMs run for {} domains", sites.len()));
    }
    Ok(faults)
}

fn print_what_to_try(name: &str) {
    let lab = paths::program("drover-lab");
    let lab = lab.display();
    println!(
        "It is left running, with {} controllers at {}. Try:\n\
         \n  {lab} --name {name} ctl cluster status\n\
         \x20 {lab} --name {name} ctl domain list\n\
         \x20 {lab} --name {name} ctl domain migrate web1 --to {FIRST}\n\
         \x20 {lab} --name {name} ctl domain console web1\n\
         \x20 {lab} --name {name} exec -- curl -s http://10.78.0.100/\n\
         \x20 {lab} --name {name} ssh host2\n\
         \x20 {lab} --name {name} kill host3\n\
         \x20 make lab-down\n",
        CONTROLLERS.len(),
        servers()
    );
}
