//! What goes wrong with bundles is said in words; the machine runs on, and the old bundle is whole.

use std::path::Path;
use std::time::Duration;

use ferry_e2e::{Host, Hosts, path};

use super::command::{PROCESS, restore};
use crate::stage::Dice;

/// 128 MiB that cannot be compressed: a save takes a while.
const LARGE: [&str; 4] = [
    "--memory",
    "128M",
    "--cmdline",
    "pattern=working-set set=8M rate=8000 fill=all fill_random=100 random=100",
];

fn id(host: &Host, dir: &Path) -> String {
    let verified = host.run(&["bundle", "verify", path(dir), "--json"]).succeeded().json();
    verified["id"].as_str().expect("an id").to_owned()
}

#[test]
fn a_hosting_process_that_is_killed_while_it_saves_leaves_the_old_bundle_or_the_new_one() {
    let hosts = Hosts::new();
    let host = &hosts.source;
    let dir = hosts.path("b");
    let mut dice = Dice(std::process::id().into());
    let runner = host.boot("m", PROCESS, &LARGE);
    host.run(&["save", "m", path(&dir)]).succeeded();
    runner.kill();
    let (mut kept, mut replaced, mut before) = (0, 0, id(host, &dir));
    for try_number in 0..7 {
        let runner = host.boot("m", PROCESS, &LARGE);
        let saving = host.start(&["save", "m", path(&dir)]);
        saving.line("round 1");
        std::thread::sleep(Duration::from_millis(dice.below(350)));
        runner.kill();
        let done = saving.end();
        let after = id(host, &dir);
        if done.status == Some(0) {
            assert_ne!(after, before, "try {try_number}: what was reported as saved is there");
        } else {
            done_by_death(&done.stderr);
        }
        if after == before {
            kept += 1
        } else {
            replaced += 1
        }
        before = after;
    }
    println!("{kept} old bundles were kept, {replaced} were replaced");
    let _again = restore(host, &dir, "m", &[]);
    host.works("m");
    // What the killed ones left is gone with the next save.
    host.run(&["save", "m", path(&dir)]).succeeded();
    assert_eq!(std::fs::read_dir(&dir).expect("a directory").count(), 3);
}

#[track_caller]
fn done_by_death(stderr: &str) {
    let last = stderr.lines().last().unwrap_or_default();
    assert!(
        last.contains("ended during the save") || last.contains("Connection reset"),
        "{stderr}"
    );
}

#[test]
fn what_cannot_be_saved_is_said_in_words_and_the_machine_runs_on() {
    let hosts = Hosts::new();
    let host = &hosts.source;
    let (good, notes) = (hosts.path("good"), hosts.path("notes"));
    let _runner = host.boot("m", PROCESS, &[]);
    let _other = host.boot("other", PROCESS, &[]);
    host.run(&["save", "m", path(&good)]).succeeded();
    host.run(&["save", "other", path(&hosts.path("others"))]).succeeded();
    let before = id(host, &good);
    std::fs::create_dir(&notes).expect("a directory");
    std::fs::write(notes.join("todo"), "much").expect("a file");
    let [nowhere, x, others] = ["no/where", "x", "others"].map(|name| hosts.path(name));
    let (x, todo) = (path(&x), notes.join("todo"));
    let cases: &[(&[&str], &[&str])] = &[
        (&[path(&notes)], &["will not save", "todo"]),
        (&[path(&nowhere)], &["make the directory", "no/where"]),
        (&[path(&todo)], &["todo"]),
        (&[x, "--base", path(&notes)], &["is not a bundle"]),
        (&[x, "--base", path(&nowhere)], &["is not a bundle", "no such directory"]),
        (&[x, "--base", path(&others)], &["cannot be the base", "`other`"]),
        (&[path(&good), "--base", path(&good)], &["would replace"]),
    ];
    for (args, words) in cases {
        for more in [&[][..], &["--stop"]] {
            let args = [&["save", "m"], *args, more].concat();
            host.run(&args).failed(&[words, &["`m`", "goes on"][..]].concat());
            host.works("m");
        }
    }
    host.run(&["save", "nobody", path(&good)]).failed(&["no machine `nobody`"]);
    assert_eq!(id(host, &good), before);
    assert_eq!(std::fs::read_to_string(notes.join("todo")).expect("a file"), "much");
}

#[test]
fn a_file_size_limit_ends_the_save_and_not_the_machine() {
    let hosts = Hosts::new();
    let limited =
        Host { before: vec!["prlimit".into(), "--fsize=16777216".into()], ..hosts.source.clone() };
    let dir = hosts.path("b");
    let _runner = limited.boot("m", PROCESS, &LARGE);
    let failed = hosts.source.run(&["save", "m", path(&dir)]);
    assert_eq!(failed.status, Some(1), "{failed:?}");
    let last = failed.stderr.lines().last().unwrap_or_default();
    assert!(last.contains("File too large") && last.contains("goes on"), "{failed:?}");
    assert!(!dir.exists());
    hosts.source.works("m");
}

#[test]
fn a_bad_bundle_is_not_started_and_what_is_wrong_with_it_is_said() {
    let hosts = Hosts::new();
    let host = &hosts.source;
    let good = hosts.path("good");
    let _runner = host.boot("m", PROCESS, &[]);
    host.run(&["save", "m", path(&good)]).succeeded();
    let file = |kind: &str| {
        let mut files =
            std::fs::read_dir(&good).expect("a bundle").map(|e| e.expect("a file").path());
        let is = |p: &std::path::PathBuf| {
            p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(kind))
        };
        files.find(is).expect("a file of each kind")
    };
    let flip = |kind: &str, at: fn(usize) -> usize| {
        let path = file(kind);
        let before = std::fs::read(&path).expect("a file");
        let mut bad = before.clone();
        let at = at(bad.len());
        bad[at] ^= 4;
        std::fs::write(&path, bad).expect("a file");
        (path, before)
    };
    let refused = |words: &[&str]| {
        host.run(&["restore", path(&good), "n"]).failed(words);
        host.run(&["bundle", "verify", path(&good)]).failed(words);
        assert_eq!(host.machines(), ["m"]);
    };
    for (kind, at) in [
        ("memory", (|n| n / 2) as fn(usize) -> usize),
        ("memory", |n| n - 1),
        ("memory", |_| 3),
        ("state", |n| n / 2),
        ("manifest", |n| n / 2),
    ] {
        let (path, before) = flip(kind, at);
        refused(&["is damaged", kind, "another copy"]);
        std::fs::write(path, before).expect("a file");
    }
    let memory = file("memory");
    let before = std::fs::read(&memory).expect("a file");
    std::fs::write(&memory, &before[..before.len() - 5]).expect("a file");
    refused(&["is damaged", "bytes, the manifest says"]);
    std::fs::write(&memory, before).expect("a file");

    let manifest = file("manifest");
    let text = std::fs::read_to_string(&manifest).expect("a file");
    std::fs::write(&manifest, text.replacen("\"version\": 2", "\"version\": 9", 1))
        .expect("a file");
    refused(&["format version 9", "reads up to 2", "update"]);
    std::fs::write(&manifest, text).expect("a file");

    host.run(&["restore", path(&good), "m"]).failed(&["is taken"]);
    host.run(&["restore", path(&hosts.path("nowhere")), "n"]).failed(&["is not a bundle"]);
    let _again = restore(host, &good, "n", &[]);
    host.works("n");
    host.works("m");
}
