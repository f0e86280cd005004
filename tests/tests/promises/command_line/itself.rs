//! What the program says of itself: help, version, completion. No node is needed for it.

use std::{path::Path, process::Command};

use anyhow::ensure;
use tracing::info;

use super::{run, typed};

#[tokio::test]
async fn help_names_every_option_and_needs_no_node() -> anyhow::Result<()> {
    const READ: &str = "--consistency --token";
    const SET: &str = "--literal --ttl --expires-at --stale-while-revalidate --stale-if-error --tag --content-type --if-absent --if-version";
    for (command, names) in [
        (
            "",
            "get set del invalidate inspect scan cluster member completion".to_owned(),
        ),
        (
            "get",
            format!(
                "<KEY> --key-base64 --raw --max-age --only-if-cached --no-cache --if-version-not --fetch-on-miss {READ}"
            ),
        ),
        ("set", format!("<KEY> <VALUE> --key-base64 {SET}")),
        ("del", "<KEY> --key-base64".into()),
        ("invalidate", "<KEY> --key-base64".into()),
        ("inspect", format!("<KEY> --key-base64 {READ}")),
        (
            "scan",
            format!("[PREFIX] --prefix-base64 --null --limit --cursor --keys-only --all {READ}"),
        ),
        ("cluster", "status health transfer-leader".into()),
        ("cluster status", String::new()),
        ("cluster health", String::new()),
        ("cluster transfer-leader", "[TO]".into()),
        ("member", "list add promote remove".into()),
        ("member list", String::new()),
        ("member add", "<NAME> <ADDRESS>".into()),
        ("member promote", "<NAME>".into()),
        ("member remove", "<NAME>".into()),
        ("completion", "bash zsh fish".into()),
    ] {
        for flag in ["--help", "-h"] {
            let help = typed(&format!("{command} {flag}")).await?;
            ensure!(
                help.code == Some(0) && help.stderr.is_empty(),
                "{command}: {help:?}"
            );
            for name in
                names
                    .split_whitespace()
                    .chain(["--endpoints", "--output", "--timeout", "Usage:"])
            {
                ensure!(
                    help.text().contains(name),
                    "{name} is not in the help of `{command}`: {}",
                    help.text()
                );
            }
        }
    }
    assert_eq!(
        typed("--version").await?.text(),
        format!("holdfast {}\n", env!("CARGO_PKG_VERSION"))
    );
    let unknown = typed("statsu").await?;
    ensure!(
        unknown.code == Some(2) && unknown.stderr.contains("statsu"),
        "{unknown:?}"
    );
    Ok(())
}

#[tokio::test]
async fn completion_is_what_the_shell_takes() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let script = async |shell: &str| {
        let ran = typed(&format!("completion {shell}")).await?;
        ensure!(ran.code == Some(0) && ran.stderr.is_empty(), "{ran:?}");
        let file = dir.path().join(shell);
        std::fs::write(&file, &ran.stdout)?;
        anyhow::Ok((ran.text(), file))
    };
    info!("--- bash");
    let (_, file) = script("bash").await?;
    accepts("bash", &file).await?;
    for (line, wanted) in [
        ("holdfast clu", "cluster"),
        ("holdfast cluster hea", "health"),
        ("holdfast set k v --if-v", "--if-version"),
    ] {
        let words = line.replace("holdfast", "");
        let ask = format!(
            "source \"$0\"; COMP_WORDS=(holdfast {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _holdfast holdfast \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\"; echo \"${{COMPREPLY[*]}}\""
        );
        let ran = run(
            Command::new("bash").args(["--norc", "-c", &ask]).arg(&file),
            b"",
        )
        .await?;
        ensure!(
            ran.code == Some(0) && ran.text().trim() == wanted,
            "`{line}` is completed to {ran:?}"
        );
    }
    info!("--- the others, where they are installed");
    for (shell, says) in [
        ("zsh", "#compdef holdfast"),
        ("fish", "complete -c holdfast"),
    ] {
        let (text, file) = script(shell).await?;
        ensure!(
            text.contains(says) && text.contains("transfer-leader") && text.contains("if-version"),
            "{text}"
        );
        if run(
            Command::new("sh").args(["-c", &format!("command -v {shell}")]),
            b"",
        )
        .await?
        .code
            == Some(0)
        {
            accepts(shell, &file).await?;
        }
    }
    Ok(())
}

/// Reads it, runs nothing.
async fn accepts(shell: &str, script: &Path) -> anyhow::Result<()> {
    let ran = run(Command::new(shell).arg("-n").arg(script), b"").await?;
    ensure!(
        ran.code == Some(0) && ran.stderr.is_empty(),
        "{shell}: {ran:?}"
    );
    Ok(())
}
