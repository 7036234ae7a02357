package initramfs

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/gobusybox/src/pkg/bb"
	"github.com/u-root/gobusybox/src/pkg/bb/findpkg"
	"github.com/u-root/gobusybox/src/pkg/golang"
	"golang.org/x/mod/modfile"
)

// busyboxModule is the module that gobusybox's generated main belongs to.
const busyboxModule = "bb.u-root.com/bb"

// A busybox is many commands in one static binary.
type busybox struct {
	dir      string   // root of our module
	scratch  string   // an empty directory
	commands []string // import paths, ours and u-root's
	tags     []string // build tags
}

// build compiles the busybox and returns the binary. Equal sources and
// toolchain give equal bytes, wherever dir and scratch are.
//
// gobusybox rewrites the commands to packages, but the build that it would do
// itself does not fit us: it works without modules, where Go falls back to the
// defaults of old releases (GODEBUG: no ML-KEM in TLS, among others), and it
// takes an import path without a dot, like ours, for the standard library. So
// the rewritten sources become modules again: each module that commands came
// from is replaced by its rewritten copy, all others are our go.mod's.
func (b busybox) build(ctx context.Context) ([]byte, error) {
	src := filepath.Join(b.scratch, "src")
	goroot, err := b.goTool(ctx, b.dir, "env", "GOROOT")
	if err != nil {
		return nil, err
	}
	env := golang.Default(golang.DisableCGO(), golang.WithGOOS("linux"), golang.WithGOARCH("amd64"),
		golang.WithGOROOT(strings.TrimSpace(string(goroot))), golang.WithGO111MODULE("on"),
		golang.WithMod(golang.ModReadonly), golang.WithBuildTag(b.tags...), golang.WithWorkingDir(b.dir))
	err = bb.BuildBusybox(discard{}, &bb.Opts{
		Env:          env,
		LookupEnv:    &findpkg.Env{},
		GenSrcDir:    b.scratch,
		CommandPaths: b.commands,
		GenerateOnly: true,
	})
	if err != nil {
		return nil, fmt.Errorf("busybox: %w", err)
	}
	modules, err := b.copyPackages(ctx, src)
	if err != nil {
		return nil, err
	}
	main := filepath.Join(src, busyboxModule)
	if err := b.writeModule(main, modules); err != nil {
		return nil, err
	}
	binary := filepath.Join(b.scratch, "bb")
	_, err = b.goTool(ctx, main, "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=",
		"-tags="+strings.Join(b.tags, ","), "-o", binary, ".")
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(binary)
	if err != nil {
		return nil, fmt.Errorf("busybox: %w", err)
	}
	return data, nil
}

// listed is what go list tells of a package.
type listed struct {
	ImportPath, Dir                     string
	GoFiles, SFiles, HFiles, EmbedFiles []string
	Module                              *listedModule
}

type listedModule struct {
	Path, Version, Dir, GoMod string
	Main                      bool
}

// copyPackages copies to src what gobusybox left out: the packages that the
// commands import from their own modules. It returns those modules.
func (b busybox) copyPackages(ctx context.Context, src string) ([]*listedModule, error) {
	out, err := b.goTool(ctx, b.dir, append([]string{"list", "-mod=readonly", "-deps", "-tags=" + strings.Join(b.tags, ","),
		"-json=ImportPath,Dir,GoFiles,SFiles,HFiles,EmbedFiles,Module"}, b.commands...)...)
	if err != nil {
		return nil, err
	}
	var packages []listed
	modules := map[string]*listedModule{}
	for d := json.NewDecoder(bytes.NewReader(out)); d.More(); {
		var p listed
		if err := d.Decode(&p); err != nil {
			return nil, fmt.Errorf("busybox: go list: %w", err)
		}
		packages = append(packages, p)
		if slices.Contains(b.commands, p.ImportPath) && p.Module != nil {
			modules[p.Module.Path] = p.Module
		}
	}
	for _, p := range packages {
		if p.Module == nil || modules[p.Module.Path] == nil || slices.Contains(b.commands, p.ImportPath) {
			continue
		}
		dst := filepath.Join(src, p.ImportPath)
		for _, name := range slices.Concat(p.GoFiles, p.SFiles, p.HFiles, p.EmbedFiles) {
			if err := copyFile(filepath.Join(dst, name), filepath.Join(p.Dir, name)); err != nil {
				return nil, err
			}
		}
	}
	var list []*listedModule
	for _, m := range modules {
		if err := copyFile(filepath.Join(src, m.Path, "go.mod"), m.GoMod); err != nil {
			return nil, err
		}
		list = append(list, m)
	}
	slices.SortFunc(list, func(a, b *listedModule) int { return strings.Compare(a.Path, b.Path) })
	return list, nil
}

// writeModule makes dir a module with the requirements of ours, in which each
// of the given modules is replaced by the copy beside dir.
func (b busybox) writeModule(dir string, modules []*listedModule) error {
	ours := filepath.Join(b.dir, "go.mod")
	data, err := os.ReadFile(ours)
	if err != nil {
		return fmt.Errorf("busybox: %w", err)
	}
	f, err := modfile.Parse(ours, data, nil)
	if err != nil {
		return fmt.Errorf("busybox: %w", err)
	}
	if err := f.AddModuleStmt(busyboxModule); err != nil {
		return fmt.Errorf("busybox: %w", err)
	}
	up := strings.Repeat("../", strings.Count(busyboxModule, "/")+1)
	for _, m := range modules {
		version := m.Version
		if m.Main {
			version = "v0.0.0" // any: the replacement has none
			f.AddNewRequire(m.Path, version, false)
		}
		// A relative path, because it is recorded in the binary.
		if err := f.AddReplace(m.Path, version, up+m.Path, ""); err != nil {
			return fmt.Errorf("busybox: %w", err)
		}
	}
	if data, err = f.Format(); err != nil {
		return fmt.Errorf("busybox: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), data, 0o644); err != nil {
		return fmt.Errorf("busybox: %w", err)
	}
	return copyFile(filepath.Join(dir, "go.sum"), filepath.Join(b.dir, "go.sum"))
}

// goTool runs the go command in dir and returns its output. Workspaces and
// the caller's GOFLAGS are out of force: both would change the result.
func (b busybox) goTool(ctx context.Context, dir string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOAMD64=v1", "GO111MODULE=on", "GOWORK=off", "GOFLAGS=")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go %s: %w\n%s", args[0], err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}

func copyFile(dst, src string) error {
	data, err := os.ReadFile(src)
	if err != nil {
		return fmt.Errorf("busybox: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return fmt.Errorf("busybox: %w", err)
	}
	if err := os.WriteFile(dst, data, 0o644); err != nil {
		return fmt.Errorf("busybox: %w", err)
	}
	return nil
}

// discard is gobusybox's logger; what matters comes back as an error.
type discard struct{}

func (discard) Printf(format string, v ...any) {}
func (discard) Print(v ...any)                 {}
