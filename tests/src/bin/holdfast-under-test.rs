//! The command line as a child process of the tests: the same `main` as `holdfast`.

fn main() -> std::process::ExitCode {
    holdfast_client::cli::main()
}
