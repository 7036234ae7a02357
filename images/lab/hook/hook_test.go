package hook

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// serve runs Local behind one end of a pipe and returns the other.
func serve(t *testing.T) net.Conn {
	t.Helper()
	client, server := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- Serve(context.Background(), server, Local) }()
	t.Cleanup(func() {
		client.Close()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	client.SetDeadline(time.Now().Add(30 * time.Second))
	return client
}

func TestCommand(t *testing.T) {
	conn := serve(t)
	a, err := Call(conn, Request{ID: "1", Target: Host, Timeout: time.Minute, Argv: []string{"sh", "-c", "cat; echo warn >&2; exit 3"}, Stdin: []byte("in")})
	if err != nil || a.Exit != 3 || string(a.Stdout) != "in" || string(a.Stderr) != "warn\n" {
		t.Errorf("%+v, %v", a, err)
	}
	if _, err = Call(conn, Request{ID: "2", Target: Host, Timeout: time.Minute, Argv: []string{"/no/such/program"}}); err == nil {
		t.Error("a missing program gave no error")
	}
	if _, err = Call(conn, Request{ID: "3", Target: Host, Timeout: 50 * time.Millisecond, Argv: []string{"sh", "-c", "sleep 100 & wait"}}); err == nil || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("timeout: %v", err)
	}
	a, err = Call(conn, Request{ID: "4", Target: Host, Timeout: time.Minute, Argv: []string{"head", "-c", "2000000", "/dev/zero"}})
	if err != nil || !a.Cut || len(a.Stdout) != maxOutput {
		t.Errorf("long output: cut %v, %d bytes, %v", a.Cut, len(a.Stdout), err)
	}
}

func TestDetach(t *testing.T) {
	file := filepath.Join(t.TempDir(), "done")
	a, err := Call(serve(t), Request{ID: "1", Target: Host, Timeout: time.Minute, Detach: true, Argv: []string{"sh", "-c", "echo yes >" + file}})
	if err != nil || len(a.Stdout) < 2 {
		t.Fatalf("%+v, %v", a, err)
	}
	for b := []byte(nil); string(b) != "yes\n"; b, _ = os.ReadFile(file) {
		if t.Context().Err() != nil {
			t.Fatal("the command never ran")
		}
	}
}

func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusTeapot)
		io.WriteString(w, r.Method+" "+r.URL.Path)
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	a, err := Call(serve(t), Request{ID: "1", Target: Host, Timeout: time.Minute, Socket: path, Method: "GET", Path: "/v1/status"})
	if err != nil || a.Exit != http.StatusTeapot || string(a.Stdout) != "GET /v1/status" {
		t.Errorf("%+v, %v", a, err)
	}
}

func TestLeftovers(t *testing.T) {
	conn := serve(t)
	go io.WriteString(conn, "{\"id\":\"old\",\"tar") // a client that went away in the middle
	a, err := Call(conn, Request{ID: "new", Target: Host, Timeout: time.Minute, Argv: []string{"echo", "yes"}})
	if err != nil || string(a.Stdout) != "yes\n" {
		t.Errorf("after half a request: %+v, %v", a, err)
	}

	client, server := net.Pipe()
	defer client.Close()
	go func() {
		defer server.Close()
		in := make([]byte, 1024)
		for n, seen := 0, ""; strings.Count(seen, "\n") < 2; seen += string(in[:n]) {
			n, _ = server.Read(in)
		}
		io.WriteString(server, "half}\n\n{\"id\":\"old\",\"exit\":9}\n{\"id\":\"new\",\"exit\":5}\n")
	}()
	a, err = Call(client, Request{ID: "new", Target: Host, Timeout: time.Minute, Argv: []string{"x"}})
	if err != nil || a.Exit != 5 {
		t.Errorf("after stale answers: %+v, %v", a, err)
	}
}

func TestValidate(t *testing.T) {
	good := Request{ID: "1", Target: Work, Timeout: time.Second, Argv: []string{"true"}}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Request){
		"no id":      func(r *Request) { r.ID = "" },
		"no target":  func(r *Request) { r.Target = "" },
		"no timeout": func(r *Request) { r.Timeout = 0 },
		"long":       func(r *Request) { r.Timeout = 24 * time.Hour },
		"nothing":    func(r *Request) { r.Argv = nil },
		"both":       func(r *Request) { r.Socket = "/s" },
		"no path":    func(r *Request) { r.Argv, r.Socket = nil, "/s" },
		"many words": func(r *Request) { r.Argv = make([]string, maxArguments+1) },
	} {
		r := good
		change(&r)
		if r.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzServe(f *testing.F) {
	f.Add([]byte("{\"id\":\"1\",\"target\":\"host\",\"timeout\":1000,\"argv\":[\"true\"]}\n"))
	f.Add([]byte("\n\n{\n}{\"id\":\"1\"}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var out bytes.Buffer
		stream := struct {
			io.Reader
			io.Writer
		}{bytes.NewReader(data), &out}
		if err := Serve(t.Context(), stream, func(context.Context, Request) Response { return Response{} }); err != nil {
			t.Fatal(err)
		}
		for line := range bytes.Lines(out.Bytes()) {
			var a Response
			if err := json.Unmarshal(line, &a); err != nil || a.ID == "" {
				t.Errorf("answer %q: %v", line, err)
			}
		}
	})
}
