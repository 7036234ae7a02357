package boot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/hostos/disk"
	"sekisho/hostos/update"
	"sekisho/hostos/vmm"
)

// Status is what GET /v1/status answers.
type Status struct {
	State    string          `json:"state"` // "booting", "running", "closed" or "stopping"
	Since    time.Time       `json:"since"`
	Reason   string          `json:"reason"` // code, empty when all is well
	Detail   string          `json:"detail"`
	Services []ServiceStatus `json:"services"`
	Disk     disk.Status     `json:"disk"` // of the work domain
	Slots    update.Status   `json:"slots"`
	Work     vmm.Status      `json:"work"`
	Modules  []ModuleStatus  `json:"modules"`
	Missing  []string        `json:"missing"` // device files that did not appear
	Memory   memory          `json:"memory"`
}

// actions is what the API does.
type actions struct {
	status   func() Status
	powerOff func()
	wake     func(context.Context) error
	recover  func(ctx context.Context, typed string) error
	wipe     func() error
	restart  func()
	ask      func() error
	update   func(ctx context.Context, image io.Reader, size int64) error
}

// RecoverRequest opens the work domain's disk by its recovery key.
type RecoverRequest struct {
	Recovery string `json:"recovery"` // secret
}

// maxBody bounds a request's body in bytes.
const maxBody = 4 << 10

// handler answers for root only.
func handler(a actions) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(a.status())
	})
	mux.HandleFunc("POST /v1/poweroff", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusAccepted)
		a.powerOff()
	})
	mux.HandleFunc("POST /v1/wake", func(w http.ResponseWriter, r *http.Request) {
		if err := a.wake(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
		}
	})
	mux.HandleFunc("POST /v1/disk/recover", func(w http.ResponseWriter, r *http.Request) {
		var req RecoverRequest
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
		d.DisallowUnknownFields()
		if err := d.Decode(&req); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if err := a.recover(r.Context(), req.Recovery); err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
		}
	})
	mux.HandleFunc("POST /v1/disk/wipe", func(w http.ResponseWriter, r *http.Request) {
		if err := a.wipe(); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("POST /v1/restart", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusAccepted)
		a.restart()
	})
	mux.HandleFunc("POST /v1/update", func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength == 0 {
			if err := a.ask(); err != nil {
				http.Error(w, err.Error(), http.StatusConflict)
			}
			return
		}
		c, until := http.NewResponseController(w), time.Now().Add(updateTime)
		if err := errors.Join(c.SetReadDeadline(until), c.SetWriteDeadline(until)); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		if err := a.update(r.Context(), r.Body, r.ContentLength); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
		}
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if uid, ok := r.Context().Value(peerKey{}).(uint32); !ok || uid != 0 {
			http.Error(w, "only root may use this socket", http.StatusForbidden)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

type peerKey struct{}

// withPeer notes the user at the other end of a unix socket (SO_PEERCRED,
// unix(7)).
func withPeer(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err != nil || cerr != nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, cred.Uid)
}

// updateTime bounds the writing of an update.
const updateTime = 15 * time.Minute

// apiTime bounds an answer: opening a disk takes a TPM and a program.
const apiTime = time.Minute

func newServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ConnContext:       withPeer,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      apiTime,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    8 << 10,
	}
}

// maxStatus bounds what a client reads of an answer.
const maxStatus = 1 << 20

// Client talks to init's API socket. It must run as root.
type Client struct{ http http.Client }

// NewClient returns a client of the socket at path.
func NewClient(path string) *Client {
	return &Client{http.Client{
		Timeout: apiTime,
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}},
	}}
}

// Status returns init's status as it was sent.
func (c *Client) Status(ctx context.Context) (Status, json.RawMessage, error) {
	var s Status
	b, err := c.do(ctx, http.MethodGet, "/v1/status", nil)
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	return s, b, err
}

// PowerOff asks for an orderly power-off and does not wait for it.
func (c *Client) PowerOff(ctx context.Context) error {
	_, err := c.do(ctx, http.MethodPost, "/v1/poweroff", nil)
	return err
}

// Wake ends the work domain's sleep.
func (c *Client) Wake(ctx context.Context) error {
	_, err := c.do(ctx, http.MethodPost, "/v1/wake", nil)
	return err
}

// Recover opens the work domain's disk by its recovery key and starts the work
// domain.
func (c *Client) Recover(ctx context.Context, typed string) error {
	body, err := json.Marshal(RecoverRequest{typed})
	if err != nil {
		return err
	}
	_, err = c.do(ctx, http.MethodPost, "/v1/disk/recover", body)
	return err
}

// Wipe destroys the key of the work domain's disk and switches the laptop off.
func (c *Client) Wipe(ctx context.Context) error {
	_, err := c.do(ctx, http.MethodPost, "/v1/disk/wipe", nil)
	return err
}

// Restart asks for an orderly restart and does not wait for it.
func (c *Client) Restart(ctx context.Context) error {
	_, err := c.do(ctx, http.MethodPost, "/v1/restart", nil)
	return err
}

// AskUpdate has init ask the verifiers for a release now.
func (c *Client) AskUpdate(ctx context.Context) error {
	_, err := c.do(ctx, http.MethodPost, "/v1/update", nil)
	return err
}

// Update has init write an image to the slot that does not run, and have it
// tried at the next start.
func (c *Client) Update(ctx context.Context, image io.Reader, size int64) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://init/v1/update", image)
	if err != nil {
		return err
	}
	req.ContentLength = size
	long := c.http
	long.Timeout = updateTime
	_, err = answer(long.Do(req))
	return err
}

func (c *Client) do(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://init"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	return answer(c.http.Do(req))
}

// answer reads what init answers.
func answer(resp *http.Response, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxStatus))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("init: %s: %.800s", resp.Status, bytes.TrimSpace(b))
	}
	return b, nil
}

// WriteStatus prints s for people.
func WriteStatus(w io.Writer, s Status) {
	fmt.Fprintf(w, "init      %s since %s", s.State, s.Since.Format(time.RFC3339))
	if s.Reason != "" {
		fmt.Fprintf(w, " (%s: %s)", s.Reason, s.Detail)
	}
	fmt.Fprintf(w, "\ndisk      %s, %s %s\nwork      %s %s\n", s.Disk.State, s.Disk.Mode, s.Disk.Detail, s.Work.State, s.Work.Detail)
	writeSlots(w, s.Slots)
	for _, v := range s.Services {
		fmt.Fprintf(w, "%-9s %s pid %d restarts %d %s\n", v.Name, v.State, v.PID, v.Restarts, v.Status)
	}
	for _, m := range s.Modules {
		if m.State != "loaded" {
			fmt.Fprintf(w, "module    %s %s\n", m.Name, m.State)
		}
	}
	for _, path := range s.Missing {
		fmt.Fprintf(w, "missing   %s\n", path)
	}
	fmt.Fprintf(w, "memory    %d of %d MiB used\n", (s.Memory.TotalKiB-s.Memory.AvailableKiB)>>10, s.Memory.TotalKiB>>10)
}

func writeSlots(w io.Writer, s update.Status) {
	fmt.Fprintf(w, "slots     running %s, good %s", s.Running, s.Good)
	if s.Size > 0 {
		fmt.Fprintf(w, ", an update is being written, %d of %d bytes", s.Written, s.Size)
	} else if t := s.Trial; t != nil {
		fmt.Fprintf(w, ", release %s in slot %s is %s", t.Version, t.Slot, t.Stage)
	}
	if f := s.Failed; f != nil {
		fmt.Fprintf(w, ", last update %s failed: %s", f.Version, f.Reason)
	}
	fmt.Fprintf(w, " %s\n", s.Detail)
}

// openConsole returns /dev/console, or the error output when there is none.
func openConsole() io.Writer {
	f, err := os.OpenFile("/dev/console", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return os.Stderr
	}
	return f
}
