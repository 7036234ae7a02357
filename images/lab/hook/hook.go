// Package hook is how the lab reaches into its laptop: requests to run a
// command or to ask a daemon's socket, in the host domain or the work domain.
// Only lab images serve them (build tag lab).
//
// A message is one line of JSON. A virtio serial port keeps what a client that
// has gone left behind, half a line perhaps; so a client begins with an empty
// line, a server skips lines that are no requests, and a client skips answers
// that do not carry its id.
package hook

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

const (
	// PortName is the virtio serial port of the lab in the host domain.
	PortName = "org.sekisho.lab"
	// PortFile is where the host domain's kernel shows it.
	PortFile = "/dev/virtio-ports/" + PortName
	// GuestPort is the vsock port of labguest in the stand-in work domain.
	GuestPort = 1099
)

const (
	// maxLine bounds one message in bytes.
	maxLine = 4 << 20
	// maxOutput bounds each output stream of a command in bytes.
	maxOutput = 1 << 20
	// maxTimeout bounds the time that a request may ask for.
	maxTimeout = 10 * time.Minute
	// maxArguments bounds Request.Argv.
	maxArguments = 256
)

// Air is an access point for labhook to put on the air.
type Air struct {
	Conf  string            `json:"conf"`            // hostapd's configuration, but for interface and bridge
	Files map[string]string `json:"files,omitempty"` // that it names, in AirDir
}

// AirDir is where the files of the access point of a number, 1 or 2, are.
func AirDir(number int) string { return fmt.Sprintf("/run/air/%d", number) }

// Target is where a request is carried out.
type Target string

const (
	Host Target = "host" // the host domain
	Work Target = "work" // the stand-in work domain
)

// Request asks for one command (Argv) or one HTTP exchange with a daemon
// (Socket), never both.
type Request struct {
	ID      string        `json:"id"`
	Target  Target        `json:"target"`
	Timeout time.Duration `json:"timeout"` // nanoseconds; the command is killed after it

	Argv  []string `json:"argv,omitempty"`
	Stdin []byte   `json:"stdin,omitempty"`
	// Detach leaves the command running without input and output; Stdout of the
	// answer is its process id.
	Detach bool `json:"detach,omitempty"`

	Socket string `json:"socket,omitempty"` // path of the daemon's unix socket
	Method string `json:"method,omitempty"`
	Path   string `json:"path,omitempty"`
}

// Validate reports what is wrong with r.
func (r *Request) Validate() error {
	switch {
	case r.ID == "" || len(r.ID) > 64:
		return fmt.Errorf("request: id of %d bytes, want 1 to 64", len(r.ID))
	case r.Target != Host && r.Target != Work:
		return fmt.Errorf("request: target %q, want host or work", r.Target)
	case r.Timeout <= 0 || r.Timeout > maxTimeout:
		return fmt.Errorf("request: timeout %s, want up to %s", r.Timeout, maxTimeout)
	case (len(r.Argv) == 0) == (r.Socket == ""):
		return errors.New("request: want either a command or a socket")
	case len(r.Argv) > maxArguments:
		return fmt.Errorf("request: %d arguments, at most %d", len(r.Argv), maxArguments)
	case r.Socket != "" && !strings.HasPrefix(r.Path, "/"):
		return fmt.Errorf("request: path %q, want one that begins with a slash", r.Path)
	}
	return nil
}

// Response answers the request with the same id.
type Response struct {
	ID     string `json:"id"`
	Exit   int    `json:"exit"` // exit status of the command, HTTP status of a daemon
	Stdout []byte `json:"stdout,omitempty"`
	Stderr []byte `json:"stderr,omitempty"`
	Cut    bool   `json:"cut,omitempty"` // an output was longer than is kept
	// Error says why the request was not carried out; Exit then means nothing.
	Error string `json:"error,omitempty"`
}

// errLong is a line over maxLine; the rest of it is skipped.
var errLong = fmt.Errorf("hook: line over %d bytes", maxLine)

// readLine returns the next line without its end. After errLong the reader
// stands at the beginning of the next line.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	long := false
	for {
		part, err := r.ReadSlice('\n')
		if !long {
			line = append(line, part...)
		}
		if len(line) > maxLine {
			long, line = true, nil
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err != nil:
			return nil, err
		case long:
			return nil, errLong
		}
		return bytes.TrimSpace(line), nil
	}
}

// writeLine writes v as one line in one Write.
func writeLine(w io.Writer, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("hook: %w", err)
	}
	if len(line) > maxLine {
		return errLong
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// Call sends r over conn and waits for its answer. The caller bounds the time
// by a deadline on conn.
func Call(conn io.ReadWriter, r Request) (Response, error) {
	if err := r.Validate(); err != nil {
		return Response{}, err
	}
	if _, err := conn.Write([]byte("\n")); err != nil {
		return Response{}, fmt.Errorf("hook: %w", err)
	}
	if err := writeLine(conn, r); err != nil {
		return Response{}, fmt.Errorf("hook: %w", err)
	}
	in := bufio.NewReader(conn)
	for {
		line, err := readLine(in)
		if errors.Is(err, errLong) {
			continue
		}
		if err != nil {
			return Response{}, fmt.Errorf("hook: no answer: %w", err)
		}
		var a Response
		if json.Unmarshal(line, &a) != nil || a.ID != r.ID {
			continue // for a client before us
		}
		if a.Error != "" {
			return a, fmt.Errorf("hook: %s domain: %s", r.Target, a.Error)
		}
		return a, nil
	}
}
