package debian

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// apt runs apt's programs on a private state directory.
type apt struct {
	dir      string // of apt's state, below the cache
	conf     string // file that APT_CONFIG names
	progress Progress
}

// aptConfig is the private configuration (apt.conf(5)). APT_CONFIG is read
// before the parts of Dir::Etc::parts, so the latter is pointed at an empty
// directory: no hook, source, key or preference of the machine is in force.
// The status file is empty, so dependencies resolve as on a bare machine. An
// update that fails in any part fails: old lists are not gone on with.
const aptConfig = `Dir "%[1]s";
Dir::State "state";
Dir::State::status "%[1]s/state/status";
Dir::Cache "cache";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Etc "etc";
Dir::Etc::main "none";
Dir::Etc::parts "empty";
Dir::Etc::sourcelist "sources.list";
Dir::Etc::sourceparts "empty";
Dir::Etc::trusted "none";
Dir::Etc::trustedparts "empty";
Dir::Etc::preferences "none";
Dir::Etc::preferencesparts "empty";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Sandbox::User "root";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
Acquire::Languages "none";
Acquire::GzipIndexes "true";
Acquire::Retries "3";
APT::Update::Error-Mode "any";
`

// newApt writes the private configuration and sources.
func newApt(ctx context.Context, c Config) (*apt, error) {
	if _, err := os.Stat(Keyring); err != nil {
		return nil, fmt.Errorf("debian: %w; install debian-archive-keyring", err)
	}
	if strings.ContainsAny(c.Cache, "\"\n;") {
		return nil, fmt.Errorf("debian: cache directory %q cannot be named in apt's configuration", c.Cache)
	}
	mirror, security := c.Mirror, c.SecurityMirror
	if mirror == "" || security == "" {
		m, s, err := machineMirrors(ctx)
		if err != nil {
			return nil, err
		}
		if mirror == "" {
			mirror = m
		}
		if security == "" {
			security = s
		}
	}
	settings, err := machineAcquire(ctx)
	if err != nil {
		return nil, err
	}
	a := &apt{dir: filepath.Join(c.Cache, "apt"), progress: c.Progress}
	a.conf = filepath.Join(a.dir, "apt.conf")
	for _, d := range []string{"state/lists/partial", "cache/archives/partial", "etc/empty", "debs"} {
		if err := os.MkdirAll(filepath.Join(a.dir, d), 0o755); err != nil {
			return nil, fmt.Errorf("debian: %w", err)
		}
	}
	source := "deb [arch=amd64 signed-by=" + Keyring + "] %s %s main\n"
	for name, content := range map[string]string{
		a.conf:                                   fmt.Sprintf(aptConfig, a.dir) + settings,
		filepath.Join(a.dir, "state/status"):     "",
		filepath.Join(a.dir, "etc/sources.list"): fmt.Sprintf(source, mirror, Suite) + fmt.Sprintf(source, security, Suite+"-security"),
	} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			return nil, fmt.Errorf("debian: %w", err)
		}
	}
	return a, nil
}

func (a *apt) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = filepath.Join(a.dir, "debs") // apt-get download writes where it stands
	cmd.Env = append(os.Environ(), "APT_CONFIG="+a.conf, "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	return cmd
}

// output runs a program and returns what it printed.
func (a *apt) output(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := a.command(ctx, name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("debian: %s %s: %w: %s", name, args[0], err, lastLines(stderr.Bytes()))
	}
	return out, nil
}

// run runs a program that fetches, and reports its progress as what.
func (a *apt) run(ctx context.Context, what, name string, args ...string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("debian: %w", err)
	}
	defer r.Close()
	cmd := a.command(ctx, name, append([]string{"--quiet=2", "-o", "APT::Status-Fd=3"}, args...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = &out, &out, []*os.File{w}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("debian: %w", err)
	}
	a.progress(what, 0, 100)
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if percent, ok := parseStatus(lines.Text()); ok {
			a.progress(what, percent, 100)
		}
	}
	_, drain := io.Copy(io.Discard, r) // a line over the scanner's limit must not block apt
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("debian: %s %s: %w: %s", name, args[0], err, lastLines(out.Bytes()))
	}
	return errors.Join(lines.Err(), drain)
}

// parseStatus reads a line of APT::Status-Fd, "dlstatus:ITEM:PERCENT:TEXT".
func parseStatus(line string) (percent int64, ok bool) {
	f := strings.SplitN(line, ":", 4)
	if len(f) < 4 || f[0] != "dlstatus" {
		return 0, false
	}
	v, err := strconv.ParseFloat(f[2], 64)
	return int64(v), err == nil && v >= 0 && v <= 100
}

// machineMirrors reads the archive and security URIs from the machine's own
// apt configuration, whatever release of Debian the machine itself runs.
func machineMirrors(ctx context.Context) (mirror, security string, err error) {
	cmd := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Identifier: Packages", "Component: main")
	out, err := cmd.Output()
	if err != nil {
		return "", "", fmt.Errorf("debian: apt-get indextargets: %w", err)
	}
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", "", fmt.Errorf("debian: %w", err)
	}
	if mirror, security = pickMirrors(out, codename(release)); mirror == "" || security == "" {
		return "", "", fmt.Errorf("debian: the machine's apt sources name no Debian archive and security archive (found %q and %q); give both mirrors' URIs", mirror, security)
	}
	return mirror, security, nil
}

// codename reads VERSION_CODENAME of os-release(5).
func codename(release []byte) string {
	for line := range strings.Lines(string(release)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			return strings.Trim(v, `"`)
		}
	}
	return ""
}

// pickMirrors chooses from lines "RELEASE URI" the archive and the security
// archive of the machine's release or of Suite.
func pickMirrors(targets []byte, codename string) (mirror, security string) {
	for line := range strings.Lines(string(targets)) {
		release, uri, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			continue
		}
		switch release {
		case codename, Suite, "stable":
			mirror = uri
		case codename + "-security", Suite + "-security", "stable-security":
			security = uri
		}
	}
	return mirror, security
}

// machineAcquire carries over how the machine reaches its mirrors: proxies,
// time-outs and, on machines that use a snapshot, the validity checks. Nothing
// that touches signatures is among it.
func machineAcquire(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-config", "dump", "--no-empty", "Acquire").Output()
	if err != nil {
		return "", fmt.Errorf("debian: apt-config dump: %w", err)
	}
	var b strings.Builder
	for line := range strings.Lines(string(out)) {
		for _, p := range []string{"Acquire::http::", "Acquire::https::", "Acquire::Check-Valid-Until ", "Acquire::Check-Date "} {
			if strings.HasPrefix(line, p) {
				b.WriteString(line)
			}
		}
	}
	return b.String(), nil
}

// lastLines is the tail of a program's complaint, for an error.
func lastLines(out []byte) string {
	out = bytes.TrimSpace(out)
	if len(out) > 600 {
		out = out[len(out)-600:]
	}
	return string(out)
}
