// Reads command lines of vfkit, a JSON list of strings a line, and answers each with a line: what vfkit's own
// parser makes of it. The steps are those of newVMConfiguration in cmd/vfkit/main.go, which only builds on macOS.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"

	"github.com/crc-org/vfkit/pkg/cmdline"
	"github.com/crc-org/vfkit/pkg/config"
	"github.com/spf13/cobra"
)

type answer struct {
	Machine *config.VirtualMachine `json:"machine,omitempty"`
	Rest    string                 `json:"rest,omitempty"`
	Words   []string               `json:"words,omitempty"`
	Error   string                 `json:"error,omitempty"`
}

func parse(argv []string) (*answer, error) {
	options := &cmdline.Options{}
	ran := false
	command := &cobra.Command{
		Use:           "vfkit",
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(*cobra.Command, []string) error { ran = true; return nil },
	}
	cmdline.AddFlags(command, options)
	command.SetArgs(argv)
	if err := command.Execute(); err != nil {
		return nil, err
	}
	if !ran {
		return nil, fmt.Errorf("this asks for help, not for a machine")
	}
	bootloader, err := bootloaderOf(options)
	if err != nil {
		return nil, err
	}
	machine := config.NewVirtualMachine(options.Vcpus, uint64(options.MemoryMiB), bootloader)
	if err := machine.AddDevicesFromCmdLine(options.Devices); err != nil {
		return nil, err
	}
	socket, err := restSocket(options.RestfulURI)
	if err != nil {
		return nil, err
	}
	for _, device := range machine.VirtioVsockDevices() {
		// How pkg/vf finds the socket to connect to.
		if dialled, err := url.Parse("unix:" + device.SocketURL); err != nil || dialled.Path != device.SocketURL {
			return nil, fmt.Errorf("%s is dialled as %v", device.SocketURL, dialled)
		}
	}
	// Stricter than the parser: it misses what a device cannot do without.
	words, err := machine.ToCmdLine()
	if err != nil {
		return nil, err
	}
	return &answer{Machine: machine, Rest: socket, Words: words}, nil
}

func bootloaderOf(options *cmdline.Options) (config.Bootloader, error) {
	if options.VmlinuzPath != "" || options.KernelCmdline != "" || options.InitrdPath != "" {
		return config.NewLinuxBootloader(options.VmlinuzPath, options.KernelCmdline, options.InitrdPath), nil
	}
	return config.BootloaderFromCmdLine(options.Bootloader.GetSlice())
}

// restSocket is parseRestfulURI of pkg/rest for UNIX sockets, with the lengths of macOS. The package itself brings a
// web framework along, which takes a minute to build.
func restSocket(uri string) (string, error) {
	parsed, err := url.ParseRequestURI(uri)
	if err != nil {
		return "", err
	}
	if parsed.Scheme != "unix" || parsed.Host != "" || parsed.Path == "" || len(parsed.Path) > 103 {
		return "", errors.New("invalid unix uri")
	}
	return parsed.Path, nil
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<24)
	out := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var argv []string
		err := json.Unmarshal(lines.Bytes(), &argv)
		var result *answer
		if err == nil {
			result, err = parse(argv)
		}
		if err != nil {
			result = &answer{Error: err.Error()}
		}
		if err := out.Encode(result); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}
