//! Imports: what the controller gets of a file, and what an operator is told when the file, the
//! controller or the operator breaks it off. What must never be is a file that looks whole and is
//! not.

use std::path::PathBuf;

use drover_proto::v1::{Image, ImageFormat};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    common::{Running, run},
    member::{Member, Script},
    stored::{End, ImportScript},
};

const MIB: usize = 1 << 20;
/// More than all buffers on the way hold, so that a member that pauses stops the sender.
const FILE_BYTES: usize = 24 * MIB + 17;
const NOBODY: &str = "127.0.0.1:1";

/// A file whose every place is different from its neighbours'.
struct ImageFile {
    _folder: tempfile::TempDir,
    path: PathBuf,
    content: Vec<u8>,
}

impl ImageFile {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("debian13.qcow2");
        let content: Vec<u8> = (0..FILE_BYTES).map(|n| ((n % 251) ^ (n >> 16)) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        Self { _folder: folder, path, content }
    }

    fn arguments(&self) -> Vec<&str> {
        let path = self.path.to_str().unwrap();
        vec!["image", "import", "debian13", "--format", "qcow2", "--file", path]
    }
}

fn member(import: ImportScript) -> Member {
    let image = Image {
        name: "images/debian13".to_owned(),
        digest: "ab".repeat(32),
        size_bytes: 3 << 30,
        nodes: vec!["nodes/host1".to_owned()],
        ..Image::default()
    };
    let import = ImportScript { image, ..import };
    Member::start(Script { import, ..Script::default() })
}

fn pausing_member() -> Member {
    member(ImportScript { pause_after: Some(MIB), ..ImportScript::default() })
}

/// The spec, then the file, in messages that the API allows; a member that is away is passed over.
#[test]
fn a_file_arrives_whole_and_in_order() {
    let file = ImageFile::new();
    let member = member(ImportScript::default());
    let servers = format!("{NOBODY},{}", member.address());
    let digest = "CD".repeat(32);
    let more = ["--sha256", &digest, "--node=host1", "--pool=ssd"];
    let ended = run(&servers, &[file.arguments(), more.to_vec()].concat());
    assert_eq!(ended.code, 0, "{ended:#?}");
    let said = "debian13 is imported on host1: 3 GiB, digest abab";
    assert!(ended.stdout.starts_with(said), "{ended:#?}");
    assert!(ended.stderr.starts_with("import image debian13: 0 B of 24.0 MiB (0%)"), "{ended:#?}");

    let seen = member.wait_for_an_import();
    assert_eq!(seen.end, End::Whole);
    assert!(seen.bytes == file.content, "the bytes differ");
    assert!(seen.chunks.iter().all(|chunk| (1..MIB).contains(chunk)), "{:?}", seen.chunks);
    assert_eq!(seen.specs.len(), 1);
    let spec = &seen.specs[0];
    assert_eq!((spec.name.as_str(), spec.format()), ("images/debian13", ImageFormat::Qcow2));
    assert_eq!(spec.sha256, digest.to_lowercase());
    assert_eq!((spec.node.as_str(), spec.pool.as_str()), ("nodes/host1", "ssd"));
    assert_eq!((spec.url.as_str(), spec.file_bytes), ("", FILE_BYTES as u64));

    let json = run(member.address(), &[vec!["-o", "json"], file.arguments()].concat());
    assert_eq!((json.code, &json.json()["name"]), (0, &"images/debian13".into()), "{json:#?}");
    assert_eq!(json.json()["nodes"][0], "nodes/host1");
}

/// On a terminal a bar follows what the controller has read, and goes away.
#[test]
fn a_terminal_shows_a_bar() {
    let file = ImageFile::new();
    let member = member(ImportScript::default());
    let mut import = Running::on_a_terminal(member.address(), &file.arguments());
    assert_eq!(member.wait_for_an_import().end, End::Whole);
    import.wait_for("debian13 is imported on host1");
    let (code, lines) = import.end();
    let shown = lines.join("\n");
    assert_eq!(code, 0, "{shown}");
    // The bar draws the first steps, then so many a second: which of the later ones is chance.
    for text in ["import image debian13 [", "%", "0 B of 24.0 MiB"] {
        assert!(shown.contains(text), "no \"{text}\": {shown:?}");
    }
    assert!(!shown.contains("import image debian13: "), "a line as in a log: {shown:?}");
}

/// A node fetches it: the spec is all that is sent.
#[test]
fn a_url_is_sent_without_bytes() {
    let member = member(ImportScript::default());
    let url = "https://images.example/debian13.raw";
    let ended =
        run(member.address(), &["image", "import", "debian13", "--url", url, "--format=raw"]);
    assert_eq!(ended.code, 0, "{ended:#?}");
    let seen = member.wait_for_an_import();
    assert_eq!((seen.end, seen.chunks.len(), seen.specs.len()), (End::Whole, 0, 1));
    let spec = &seen.specs[0];
    assert_eq!((spec.url.as_str(), spec.format()), (url, ImageFormat::Raw));
    assert_eq!((spec.sha256.as_str(), spec.file_bytes), ("", 0));
}

/// What the command line can see is said before anybody is asked.
#[test]
fn what_cannot_be_imported_asks_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (empty, pipe, fine) = (path("empty"), path("pipe"), path("fine"));
    std::fs::write(&empty, b"").unwrap();
    std::fs::write(&fine, b"x").unwrap();
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let of_file = |file: &str| vec![format!("--file={file}"), "--format=raw".to_owned()];
    let with = |more: &str| [of_file(&fine), vec![more.to_owned()]].concat();
    let owned = |args: &[&str]| args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();
    for (args, expected) in [
        (of_file(&path("none")), "none\" does not exist"),
        (of_file(folder.path().to_str().unwrap()), "is a directory: a file is expected"),
        (of_file(&empty), "empty\" is empty: an image is expected"),
        (of_file(&pipe), "pipe\" is a device or a pipe"),
        (of_file("-"), "stands for the standard input"),
        (of_file(""), "is empty: a file's path is expected"),
        (with("--sha256=abc"), "64 hexadecimal digits are expected"),
        (with("--sha256="), "64 hexadecimal digits are expected"),
        (with("--pool=nodes/host1/pools/ssd"), "a pool's id is expected"),
        (with("--url=http://a/x"), "cannot be used with"),
        (owned(&["--format=raw"]), "<--file <PATH>|--url <URL>>"),
        (owned(&["--url=ftp://a/x", "--format=raw"]), "http:// or https:// with a host"),
        (vec![format!("--file={fine}")], "--format <FORMAT>"),
        (vec![format!("--file={fine}"), "--format=vmdk".to_owned()], "possible values: raw, qcow2"),
    ] {
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        run(NOBODY, &[&["image", "import", "debian13"], &args[..]].concat()).says(2, expected);
    }
}

/// A refusal at the beginning and one in the middle: its own words and its own exit code.
#[test]
fn a_refusal_ends_it_with_its_reason() {
    let file = ImageFile::new();
    let full = Status::with_error_details(
        Code::ResourceExhausted,
        "pool ssd of nodes/host1 needs 3 GiB, 1 GiB free",
        ErrorDetails::with_error_info("NO_ROOM", "drover", []),
    );
    let refusing = member(ImportScript { refused: Some(full.clone()), ..Default::default() });
    run(refusing.address(), &file.arguments()).says(5, "error: pool ssd of nodes/host1 needs 3");

    let refused_after = Some((5 * MIB, full));
    let refusing = member(ImportScript { refused_after, ..Default::default() });
    run(refusing.address(), &file.arguments()).says(5, "error: pool ssd of nodes/host1 needs 3");
    let seen = refusing.wait_for_an_import();
    assert!(seen.end == End::Refused && seen.bytes.len() < FILE_BYTES / 2);

    let mut details = ErrorDetails::new();
    details.add_bad_request_violation("spec.format", "\"qcow2\" has a backing file");
    let odd = Status::with_error_details(Code::InvalidArgument, "spec.format", details);
    let refused_after = Some((1, odd));
    let refusing = member(ImportScript { refused_after, ..Default::default() });
    let expected = "error: spec.format: \"qcow2\" has a backing file";
    run(refusing.address(), &file.arguments()).says(2, expected);
}

/// Ctrl-C in the middle ends the import itself, and the controller can tell.
#[test]
fn ctrl_c_ends_it_and_the_file_never_looks_whole() {
    let file = ImageFile::new();
    let member = pausing_member();
    let mut import = Running::start(member.address(), &file.arguments());
    import.wait_for("import image debian13: ");
    import.signal("INT");
    let (code, lines) = import.end();
    assert_eq!(code, 130, "{lines:#?}");
    let said = "error: the import of debian13 was interrupted: nothing of it is kept";
    assert!(lines.iter().any(|line| line == said), "{lines:#?}");
    member.go_on();
    let seen = member.wait_for_an_import();
    assert!(seen.end == End::Broken && seen.bytes.len() < FILE_BYTES, "{:?}", seen.end);
}

#[test]
fn a_timeout_ends_it_as_well() {
    let file = ImageFile::new();
    let member = pausing_member();
    let args = [file.arguments(), vec!["--timeout=1s"]].concat();
    run(member.address(), &args).says(6, "error: the import of debian13 is not done after 1.");
    member.go_on();
    assert_eq!(member.wait_for_an_import().end, End::Broken);
}

/// The controller dies in the middle: said, and not begun again behind the operator's back.
#[test]
fn a_member_that_dies_breaks_it_off() {
    let file = ImageFile::new();
    let (first, second) = (pausing_member(), member(ImportScript::default()));
    let servers = format!("{},{}", first.address(), second.address());
    let mut import = Running::start(&servers, &file.arguments());
    import.wait_for("import image debian13: ");
    first.kill();
    let (code, lines) = import.end();
    assert_eq!(code, 8, "{lines:#?}");
    let said = |text: &str| lines.iter().any(|line| line.starts_with(text));
    assert!(said("error: the import of debian13 broke off: "), "{lines:#?}");
    assert!(said("hint: vpsctl image show debian13 says"), "{lines:#?}");
}

/// All was done, and the answer alone was lost: the file is not sent again, and nothing is wrong.
#[test]
fn an_answer_that_is_lost_is_asked_for_again() {
    let file = ImageFile::new();
    let member = member(ImportScript { loses_its_answer: true, ..ImportScript::default() });
    let ended = run(member.address(), &file.arguments());
    assert_eq!(ended.code, 0, "{ended:#?}");
    assert!(ended.stdout.starts_with("debian13 is imported on host1"), "{ended:#?}");
    let seen = member.wait_for_an_import();
    assert!(seen.end == End::Whole && seen.bytes == file.content);
}

/// A file that is cut while it is read: its end is no end of the messages.
#[test]
fn a_file_that_becomes_shorter_breaks_it_off() {
    let file = ImageFile::new();
    let member = pausing_member();
    let mut import = Running::start(member.address(), &file.arguments());
    import.wait_for("import image debian13: ");
    let cut = std::fs::OpenOptions::new().write(true).open(&file.path).unwrap();
    cut.set_len(MIB as u64).unwrap();
    member.go_on();
    let (code, lines) = import.end();
    assert_eq!(code, 1, "{lines:#?}");
    let said = "debian13.qcow2\" became shorter while it was read";
    assert!(lines.iter().any(|line| line.ends_with(said)), "{lines:#?}");
    assert_eq!(member.wait_for_an_import().end, End::Broken);
}

/// A controller that ends without an image and without an error is not taken for success.
#[test]
fn no_image_is_no_success() {
    let file = ImageFile::new();
    let silent = Member::start(Script::default());
    let said = "error: the controller ended the import of debian13 without an image";
    run(silent.address(), &file.arguments()).says(1, said);
    assert_eq!(silent.wait_for_an_import().end, End::Whole);
}
