//! End-to-end tests: one lab, one cluster, stories that an operator would recognise.
//!
//! Needs root. `cargo test -p drover-e2e --test lab [-- WORD…]` runs those whose name has one of
//! the words. A failed run leaves the logs of everything in the cache, under `logs/test`.

mod bad_input;
mod disks;
mod faults;
mod fragile;
mod shared_pool;
mod storage_crash;
mod storage_faults;
mod story;
mod world;

use std::process::ExitCode;
use std::time::Instant;

use drover_e2e::{Result, paths};

use crate::world::World;

type Test = (&'static str, fn(&mut World) -> Result<()>);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let all = [
        story::TESTS,
        disks::TESTS,
        shared_pool::TESTS,
        bad_input::TESTS,
        faults::TESTS,
        storage_faults::TESTS,
        storage_crash::TESTS,
    ]
    .concat();
    let wanted = |name: &str| words.is_empty() || words.iter().any(|w| name.contains(w.as_str()));
    let tests: Vec<Test> = all.iter().copied().filter(|(name, _)| wanted(name)).collect();
    if std::env::args().any(|a| a == "--list") {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", tests.len());
    if tests.is_empty() {
        return report(0, 0, all.len(), Instant::now());
    }
    run(&tests, all.len() - tests.len())
}

fn run(tests: &[Test], filtered: usize) -> ExitCode {
    let begin = Instant::now();
    let mut world = match World::start() {
        Ok(world) => world,
        Err(error) => {
            println!("the lab did not start: {error}");
            return report(0, tests.len(), filtered, begin);
        }
    };
    let mut failures = Vec::new();
    for (name, test) in tests {
        let start = Instant::now();
        let result = test(&mut world).and_then(|()| world.tidy());
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(()) => println!("test {name} ... ok ({seconds:.1} s)"),
            Err(error) => {
                println!("test {name} ... FAILED ({seconds:.1} s)\n    {error}");
                failures.push(*name);
                // The next one deserves a clean start.
                if let Err(error) = world.repair() {
                    println!("    the lab could not be put in order: {error}");
                }
            }
        }
    }
    if !failures.is_empty() {
        let folder = paths::cache_dir().join("logs/test");
        match world.lab().save_logs(&folder) {
            Ok(()) => println!("\nlogs are in {}", folder.display()),
            Err(error) => println!("\nthe logs could not be kept: {error}"),
        }
        println!("\nfailures:\n    {}", failures.join("\n    "));
    }
    if let Err(error) = world.end() {
        println!("the lab could not be taken down: {error}");
        failures.push("end");
    }
    report(tests.len().saturating_sub(failures.len()), failures.len(), filtered, begin)
}

/// In the words of cargo's own runner.
fn report(passed: usize, failed: usize, filtered: usize, begin: Instant) -> ExitCode {
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; \
         {filtered} filtered out; finished in {:.2}s\n",
        begin.elapsed().as_secs_f64()
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
